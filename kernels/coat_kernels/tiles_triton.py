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
def dither_factor(ptr, count):
    """A factor in [1, 2) from the first ``count`` values of a row, 256 at most; the twin of ``formats``' function."""
    i = tl.arange(0, 256)
    values = tl.load(ptr + i, mask=i < count, other=0.0).to(tl.float32)
    total = tl.sum((values.to(tl.int32, bitcast=True) & 0x7FFFFF).to(tl.uint32), axis=0)
    return 1.0 + ((total * 0x9E3779B1) >> 24).to(tl.float32) * (1.0 / 256)


@triton.jit
def scale_from_bits(amax_bits, EMAX: tl.constexpr, POWER_OF_TWO: tl.constexpr, factor=1.0):
    """The scale of values whose largest :func:`magnitude_bits` is given; the twin of ``formats.scale_from_amax``."""
    if POWER_OF_TWO:
        top = (1.75 * factor + tl.zeros_like(amax_bits).to(tl.float32)).to(tl.int32, bitcast=True)
        bits = (tl.minimum(amax_bits, 0x7F800000) + 0x7FFFFF - (top & 0x7FFFFF)) & 0x7F800000
        bits += ((127 - EMAX) << 23) - (top & 0x7F800000)
        scale = tl.maximum(bits, 1 << 23).to(tl.float32, bitcast=True) * factor
    else:
        amax = amax_bits.to(tl.float32, bitcast=True)
        scale = tl.maximum(amax * (1.0 / (1.75 * 2.0**EMAX)), 1.1754943508222875e-38)
    return tl.where(amax_bits < 0x7F800000, scale, float("nan"))


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
    s = scale_from_bits(tl.max(magnitude_bits(x), axis=2), EMAX, S_DTYPE == tl.uint8)
    stored = pack_scale(s, S_DTYPE)
    x = x * tl.div_rn(1.0, unpack_scale(stored))[:, :, None]
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
def to_fp8(x, EMAX: tl.constexpr):
    """FP8 codes of float32 ``x``: held inside the format's range, rounded to nearest even."""
    dtype: tl.constexpr = tl.float8e4nv if EMAX == 8 else tl.float8e5
    if INTERPRETED:  # whose cast loses the carry into the next binade
        return to_fp8_bits(x, EMAX).to(dtype, bitcast=True)
    else:
        return x.to(dtype)  # the instruction holds it inside the range


@triton.jit
def to_float(x, DTYPE: tl.constexpr):
    """Float32 ``x`` in float dtype ``DTYPE``, rounded to nearest even (the interpreter's own BF16 cast truncates)."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, rounded, bits).to(tl.float32, bitcast=True)
    return x.to(DTYPE)
