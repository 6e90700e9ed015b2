"""The pieces that the Triton kernels share: magnitudes, scales, and casts that are right in the interpreter too.

``EMAX`` is the exponent of an FP8 format's largest number (see formats.py): 8 for E4M3, 15 for E5M2. It identifies the
format inside a kernel.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def magnitude_bits(x):
    """Bits of |x| of float32 ``x`` as int32: ordered like magnitudes, with inf and NaN above all finite numbers."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _larger_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def larger_magnitude(top, x):
    """The larger of ``top`` and |x|, elementwise, of float32 numbers; NaN if one of them is: one instruction."""
    return _larger_or_nan(top, tl.abs(x))


@triton.jit
def amax_bits(x, axis: tl.constexpr):
    """The largest :func:`magnitude_bits` of float32 ``x`` along ``axis``."""
    if INTERPRETED:  # which calls a function for each pair of values
        return tl.max(magnitude_bits(x), axis=axis)
    else:
        return magnitude_bits(tl.reduce(tl.abs(x), axis, _larger_or_nan))


@triton.jit
def fast_reciprocal(x):
    """1 / x of normal float32 ``x``; on a GPU zero where that would be below 2**-126. One instruction."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def scale_from_bits(amax_bits, EMAX: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """The scale of values whose largest :func:`magnitude_bits` is given; the twin of ``formats.scale_from_amax``."""
    if POWER_OF_TWO:
        bits = ((tl.minimum(amax_bits, 0x7F800000) + 0x1FFFFF) & 0x7F800000) - (EMAX << 23)
        scale = tl.maximum(bits, 1 << 23).to(tl.float32, bitcast=True)
    else:
        amax = amax_bits.to(tl.float32, bitcast=True)
        scale = tl.maximum(amax * (1.0 / (1.75 * 2.0**EMAX)), 1.1754943508222875e-38)
    return tl.where(amax_bits < 0x7F800000, scale, float("nan"))


@triton.jit
def inverse_scale(s, POWER_OF_TWO: tl.constexpr):
    """``1 / s`` of float32 scales, which are NaN or, if powers of two, between 2**-126 and 2**126."""
    if POWER_OF_TWO:  # by the exponent, as a division that rounds right is a loop of instructions and a branch
        inverse = ((254 << 23) - s.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
        return tl.where(s == s, inverse, s)
    else:
        return tl.div_rn(1.0, s)


@triton.jit
def pack_scale(s, DTYPE: tl.constexpr):
    """Float32 scales as they are stored; the twin of ``formats.pack_scale``."""
    bits = s.to(tl.int32, bitcast=True)
    if DTYPE == tl.uint8:
        stored = (bits >> 23).to(tl.uint8)
    elif DTYPE == tl.bfloat16:
        up = tl.where((bits & 0x7F800000) == 0x7F800000, bits, (bits + 0xFFFF) & -65536)
        stored = up.to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        stored = s
    return stored


@triton.jit
def unpack_scale(stored):
    """Stored scales as float32; the twin of ``formats.unpack_scale``."""
    if stored.dtype == tl.uint8:
        s = (stored.to(tl.int32) << 23).to(tl.float32, bitcast=True)
        scale = tl.where(stored == 255, float("nan"), s)
    else:
        scale = stored.to(tl.float32)
    return scale


@triton.jit
def quantize_groups(x, GROUP: tl.constexpr, EMAX: tl.constexpr, S_DTYPE: tl.constexpr):
    """Float32 values [T, H] of a tile, scaled per group of GROUP along H and ready for :func:`to_fp8`, and the scales
    as they are stored, [T, H / GROUP]. Scales are powers of two where they are stored as E8M0 (uint8)."""
    BLOCK_T: tl.constexpr = x.shape[0]
    BLOCK_H: tl.constexpr = x.shape[1]
    x = tl.reshape(x, [BLOCK_T, BLOCK_H // GROUP, GROUP])
    s = scale_from_bits(amax_bits(x, 2), EMAX, S_DTYPE == tl.uint8)
    stored = pack_scale(s, S_DTYPE)
    inverse = inverse_scale(s, True) if S_DTYPE == tl.uint8 else inverse_scale(unpack_scale(stored), False)
    x = x * inverse[:, :, None]
    return tl.reshape(x, [BLOCK_T, BLOCK_H]), stored


@triton.jit
def scale_groups(x, stored, GROUP: tl.constexpr):
    """Float32 codes [T, H] of a tile times their group's stored scale [T, H / GROUP]."""
    BLOCK_T: tl.constexpr = x.shape[0]
    BLOCK_H: tl.constexpr = x.shape[1]
    x = tl.reshape(x, [BLOCK_T, BLOCK_H // GROUP, GROUP])
    return tl.reshape(x * unpack_scale(stored)[:, :, None], [BLOCK_T, BLOCK_H])


# Four conversions; the exclusive or with zero, which ptxas cannot know to be one, keeps its fault away (to_fp8_bits).
_CONVERT = tl.constexpr("""{
    .reg .b16 low, high; .reg .b32 zero;
    cvt.rn.satfinite.FORMATx2.f32 low, $2, $1;
    cvt.rn.satfinite.FORMATx2.f32 high, $4, $3;
    mov.u32 zero, %nctaid.z;
    sub.u32 zero, zero, 1;
    mov.b32 $0, {low, high};
    xor.b32 $0, $0, zero;
}""")
_CONVERT_E4M3 = tl.constexpr(_CONVERT.value.replace("FORMAT", "e4m3"))
_CONVERT_E5M2 = tl.constexpr(_CONVERT.value.replace("FORMAT", "e5m2"))


@triton.jit
def to_fp8_bits(x, EMAX: tl.constexpr):
    """The bits (uint8) of :func:`to_fp8`, in a kernel whose grid has no third dimension.

    It serves codes that change their layout before they are stored: there ptxas up to 12.9 at least, which Triton
    brings for Hopper, corrupts what the conversion instruction gives (triton-lang/triton#11111) unless something
    stands between the two.

    The interpreter rounds by integer arithmetic: a float32 number that is 2**120 (E4M3) or 2**112 (E5M2) times smaller
    has the FP8 format's own exponent field, for subnormal numbers too; so adding half a step and cutting the mantissa
    off rounds it, ties to even.
    """
    if INTERPRETED:
        bound: tl.constexpr = 1.75 * 2.0**EMAX
        cut: tl.constexpr = 20 if EMAX == 8 else 21
        x = tl.minimum(tl.maximum(x, -bound), bound) * (2.0**-120 if EMAX == 8 else 2.0**-112)
        bits = x.to(tl.uint32, bitcast=True)
        bits += ((1 << (cut - 1)) - 1) + ((bits >> cut) & 1)
        return (((bits >> cut) & 0x7F) | ((bits >> 24) & 0x80)).to(tl.uint8)
    else:
        return tl.inline_asm_elementwise(
            _CONVERT_E4M3 if EMAX == 8 else _CONVERT_E5M2, "=r,r,r,r,r", [x], dtype=tl.uint8, is_pure=True, pack=4
        )


@triton.jit
def to_fp8_words(x0, x1, x2, x3, EMAX: tl.constexpr):
    """The bits of four tensors as int32, in the order of memory.

    Rows of a transposed tile are tokens, a byte each. With four successive tokens in one word a thread hands a quarter
    of the pieces to other threads.
    """
    if INTERPRETED:
        bits = _checked_bits(x0, EMAX) | (_checked_bits(x1, EMAX) << 8)
        return bits | (_checked_bits(x2, EMAX) << 16) | (_checked_bits(x3, EMAX) << 24)
    else:
        return tl.inline_asm_elementwise(
            _CONVERT_E4M3 if EMAX == 8 else _CONVERT_E5M2, "=r,r,r,r,r", [x0, x1, x2, x3], dtype=tl.int32,
            is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _checked_bits(x, EMAX: tl.constexpr):
    """:func:`to_fp8_bits` in the interpreter, where the bits of a NaN are otherwise a number's."""
    return tl.where(x == x, to_fp8_bits(x, EMAX).to(tl.int32), 0x7F)


@triton.jit
def to_fp8(x, EMAX: tl.constexpr):
    """FP8 codes of float32 ``x``: held inside the format's range, rounded to nearest even."""
    dtype: tl.constexpr = tl.float8e4nv if EMAX == 8 else tl.float8e5
    if INTERPRETED:  # whose cast loses the carry into the next binade
        return to_fp8_bits(x, EMAX).to(dtype, bitcast=True)
    else:
        return x.to(dtype)  # the instruction holds it inside the range


@triton.jit
def to_float(x, DTYPE: tl.constexpr):
    """Float32 ``x`` in float dtype ``DTYPE``, rounded to nearest even (the interpreter's own BF16 cast truncates).

    BF16 numbers are made in pairs: the instruction that makes one alone has a quarter of the throughput.
    """
    if DTYPE != tl.bfloat16:
        return x.to(DTYPE)
    elif INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(x == x, rounded, bits).to(tl.float32, bitcast=True).to(DTYPE)
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )


@triton.jit
def to_float32(x):
    """``x`` as float32; BF16 numbers in pairs: one instruction for each, of which Triton's cast takes one or two."""
    if x.dtype != tl.bfloat16 or INTERPRETED:
        return x.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 low, high; shl.b32 low, $2, 16; and.b32 high, $2, 0xffff0000; "
            "mov.b32 $0, low; mov.b32 $1, high; }",
            "=f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def store_scales(ptr, s, mask):
    """Store a small tensor that many threads hold, from where it lies; ``ptr`` and ``mask`` have the shape of ``s``.

    Triton's own store first spreads such a tensor over the threads through shared memory, behind two barriers.
    """
    if INTERPRETED or s.dtype != tl.uint8:
        tl.store(ptr, s, mask=mask)
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred here; setp.ne.b32 here, $3, 0; @here st.global.u8 [$1], $2; mov.b32 $0, 0; }",
            "=r,l,r,r", [ptr.to(tl.int64), s.to(tl.int32), mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
