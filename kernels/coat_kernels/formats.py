"""The two FP8 formats, the one scale convention, and how a scale is found.

Everywhere in this project ``x ≈ x_q * x_s``: ``x_q`` are FP8 codes, ``x_s`` is a float32 scale. Names of sizes:

    T tokens    H hidden    I intermediate    G group    V vocabulary    M, N, K of a matrix product

A scale maps the largest magnitude of its values (amax) onto the format's largest number. Both formats have 1.75 as the
mantissa of that number (448 = 1.75 * 2**8, 57344 = 1.75 * 2**15), so the smallest power of two that still holds every
value follows from the bits of amax by integer arithmetic, exactly:

    exponent(scale) = exponent(amax) - emax, plus one if mantissa(amax) > 1.75

Power-of-two scales cost at most one step of the exponent range and no precision of a normal number; multiplying by
them is exact, so codes can be moved from one scale to another without a second rounding.

Stated outcomes. All-zero values get the smallest normal scale and codes of zero. Values whose amax is not finite get a
NaN scale, so they dequantize to NaN: a broken number is never turned into a plausible one. Nothing saturates
otherwise.
"""

import enum

import torch


class Fp8Format(str, enum.Enum):
    """FP8 formats of OCP OFP8 1.0: ``e4m3`` for precision (largest 448), ``e5m2`` for range (largest 57344)."""

    E4M3 = "e4m3"
    E5M2 = "e5m2"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn if self is Fp8Format.E4M3 else torch.float8_e5m2


class Granularity(str, enum.Enum):
    """How many values share one scale: the whole tensor, one token (row), or a group along the last dimension."""

    TENSOR = "tensor"
    TOKEN = "token"
    GROUP = "group"


class ScaleFormat(str, enum.Enum):
    """How the scales of a group are stored: ``float32``, ``bfloat16``, or ``e8m0``, one byte for a power of two."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    E8M0 = "e8m0"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored scales; E8M0 (OCP MX 1.0, 2**(byte - 127), 255 is NaN) is held as uint8."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "e8m0": torch.uint8}[self.value]


SCALE_DTYPES = tuple(format.dtype for format in ScaleFormat)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
MAX_EXPONENT = {torch.float8_e4m3fn: 8, torch.float8_e5m2: 15}  # the exponent of the largest number, 1.75 * 2**emax
SMALLEST_NORMAL = 2.0**-126
INF_BITS = 0x7F800000
ABOVE = 0x001FFFFF  # carries the mantissa of a float32 number into its exponent if it is above 1.75


def largest(dtype: torch.dtype) -> float:
    """The largest finite number of an FP8 dtype."""
    return 1.75 * 2.0 ** MAX_EXPONENT[dtype]


def scale_from_amax(amax: torch.Tensor, dtype: torch.dtype, power_of_two: bool) -> torch.Tensor:
    """Scales of values whose largest magnitude is ``amax``, float32 of any shape; NaN where it is not finite."""
    if power_of_two:
        bits = amax.view(torch.int32).clamp(max=INF_BITS)  # NaN behaves as inf here; both become NaN below
        bits = ((bits + ABOVE) & INF_BITS) - (MAX_EXPONENT[dtype] << 23)
        scale = bits.clamp(min=1 << 23).view(torch.float32)
    else:
        scale = (amax * (1.0 / largest(dtype))).clamp(min=SMALLEST_NORMAL)
    return torch.where(amax.isfinite(), scale, float("nan"))


def pack_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Float32 scales as they are stored (``ScaleFormat.dtype``): rounded up, so that no code leaves its range."""
    bits = scale.contiguous().view(torch.int32)
    if dtype == torch.uint8:  # E8M0, of powers of two
        return (bits >> 23).to(torch.uint8)  # NaN has the exponent field 255 already
    if dtype == torch.bfloat16:
        return torch.where(scale.isfinite(), ((bits + 0xFFFF) & -65536).view(torch.float32), scale).to(dtype)
    return scale


def unpack_scale(stored: torch.Tensor) -> torch.Tensor:
    """Stored scales as float32."""
    if stored.dtype == torch.uint8:
        scale = (stored.int() << 23).view(torch.float32)
        return torch.where(stored == 255, float("nan"), scale)
    return stored.float()


def encode(x: torch.Tensor, inverse_scale: torch.Tensor | float, dtype: torch.dtype) -> torch.Tensor:
    """Codes of float32 ``x`` times ``inverse_scale``: rounded to nearest even, held inside the format's range."""
    bound = largest(dtype)
    return (x * inverse_scale).clamp(-bound, bound).to(dtype)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
