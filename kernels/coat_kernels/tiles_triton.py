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
def to_fp8_bits(x, EMAX: tl.constexpr):
    """The bits (uint8) of :func:`to_fp8` by integer arithmetic.

    A float32 number that is 2**120 (E4M3) or 2**112 (E5M2) times smaller has the FP8 format's own exponent field, for
    subnormal numbers too; so adding half a step and cutting the mantissa off rounds it, ties to even.

    It serves codes that change their layout before they are stored: ptxas up to 12.9 at least, which Triton brings for
    Hopper, corrupts the results of the conversion instruction there (triton-lang/triton#11111).
    """
    bound: tl.constexpr = 1.75 * 2.0**EMAX
    cut: tl.constexpr = 20 if EMAX == 8 else 21
    x = tl.minimum(tl.maximum(x, -bound), bound) * (2.0**-120 if EMAX == 8 else 2.0**-112)
    bits = x.to(tl.uint32, bitcast=True)
    bits += ((1 << (cut - 1)) - 1) + ((bits >> cut) & 1)
    return (((bits >> cut) & 0x7F) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def to_fp8(x, EMAX: tl.constexpr):
    """FP8 codes of float32 ``x``: held inside the format's range, rounded to nearest even."""
    dtype: tl.constexpr = tl.float8e4nv if EMAX == 8 else tl.float8e5
    if INTERPRETED:  # whose cast loses the carry into the next binade
        return to_fp8_bits(x, EMAX).to(dtype, bitcast=True)
    else:
        bound: tl.constexpr = 1.75 * 2.0**EMAX
        return tl.minimum(tl.maximum(x, -bound), bound).to(dtype)


@triton.jit
def to_float(x, DTYPE: tl.constexpr):
    """Float32 ``x`` in float dtype ``DTYPE``, rounded to nearest even (the interpreter's own BF16 cast truncates)."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, rounded, bits).to(tl.float32, bitcast=True)
    return x.to(DTYPE)
