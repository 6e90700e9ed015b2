"""How an optimizer's moments are kept in 8 bits per value, and BF16 weights in 16 or 24.

The last dimension of a parameter is cut into groups of G values (the last group of a row may be shorter). A group of a
moment is one code per value, a scale, and in ``paper`` an expansion.

``paper`` (arXiv 2410.19313, section 3), E4M3 codes with dynamic range expansion; 5 bytes of side data per group:

    scale      s = max |x|
    expansion  e = floor(16 * log2(448**2 / 2) / log2(max |x| / min |x|)), held between 1 and 255; the power k = e / 16
    code       q = E4M3 of sign(x) * 448 * (|x| / s)**k             decoded:  x = s * sign(q) * (|q| / 448)**(1 / k)

The minimum is over the values that are not zero. The power stretches (k > 1) or squeezes (k < 1) the group until it
fills the range of E4M3: its largest value lands on 448, its smallest at 448 * 2**-16.61 = 2.3 * 2**-9 or above, never
on zero. The paper recentres a group by sqrt(max * min) before the power; that cancels out.

``e4m3``: the same with k = 1 and no expansion; s is 448 times the scale of ``x ≈ x_q * x_s``.

``lean``: v is never negative and wants equal relative errors over many binades; m / sqrt(v) is what the step uses, is
bounded (by 7.3 for betas of 0.9 and 0.999), and has no wide range. So with r = sqrt(v):

    second moment  s = max r        code  c = round(255 * sqrt(r / s)), uint8      decoded:  s (c / 255)**2
    first moment   s = max |m / r|  code  q = round(127 * m / r / s), int8         decoded:  s q / 127 * r'

where r' is the decoded root of v. An error of v cancels in m / sqrt(v). A moment alone, without a second one, is
s q |q| / 127**2 with s = max |x|, q = round(127 * sqrt(|x| / s)) with the sign of x.

Encoding what was decoded gives the same codes under the same scale and expansion. Where a group's largest value stays,
its scale does. All of a group follows its largest value when that decays, however slowly: codes are relative to it.
Chosen anew, e may differ by a step or two: the smallest value was rounded, since 2.3 * 2**-9 is no code. Groups that
span more than 2**8 settle after a few rounds; narrower ones need not, and their smallest values may wander.

Stated outcomes:

- Magnitudes below the smallest normal float32 number, 2**-126, count as zero. Zeros stay zero and have no part in the
  choice of e. A group of zeros has s = 0, e = 16. A constant group has e = 255 and keeps its magnitude and its signs.
- A second moment that is not zero gets no code of zero: it is rounded up to the smallest code at least, so that a step
  may be too small but never explodes. It may still decode to zero, below 2**-126 of its group's largest; in ``lean``
  nothing comes below 2**-32 of it. In ``lean`` a first moment beside a second one of zero is zero.
- A group with a value that is not finite has a scale that is not, and codes that mean nothing.

BF16 weights are rounded to nearest even (:attr:`Weights.NEAREST`); or up or down by chance, with probabilities that
keep the mean (:attr:`Weights.STOCHASTIC`), where chance is a hash of a key and the value's index, the same on every
device; or kept in 24 bits (:attr:`Weights.MASTER`): the parameter is the nearest BF16 number, ties away from zero, and
a byte beside it counts how many 256ths of the distance to the next one the weight lies above or below. If the
parameter is overwritten from outside, the old byte moves the new value by half of that distance at most.
"""

import enum
from collections.abc import Iterator

import torch
from torch.nn.functional import hardshrink, pad, threshold

from .formats import SMALLEST_NORMAL, largest, round_up

PARAMETER_DTYPES = (torch.bfloat16, torch.float32)
CODES = torch.float8_e4m3fn
LARGEST = largest(CODES)
LOG2_LARGEST = 8.807354922057604  # log2(448)
EXPANSION_BITS = 16 * (2 * LOG2_LARGEST - 1)  # 16 * log2(448**2 / 2)
SMALLEST_CODE = 2.0**-9
LARGEST_SUBNORMAL = SMALLEST_NORMAL - 2.0**-149
_CODE_VALUES = torch.arange(256, dtype=torch.uint8, device="cpu").view(CODES).double()
LOG2_CODES = (_CODE_VALUES.abs() / LARGEST).log2().float()  # log2(|q| / 448), -inf for zero
NO_EXPANSION = 16  # k = 1
MAX_GROUP_SIZE = 1024
MIN_EPS = 1e-15
SLAB = 1 << 16  # values of a parameter that the references step at a time


class StateFormat(str, enum.Enum):
    """How moments are kept, see the head of this file: ``lean``, ``paper``, or plain ``e4m3``."""

    LEAN = "lean"
    PAPER = "paper"
    E4M3 = "e4m3"

    @property
    def expands(self) -> bool:
        """Whether a group has an expansion beside its scale."""
        return self is StateFormat.PAPER

    @property
    def group_bytes(self) -> int:
        """Bytes of side data per group of a moment."""
        return 4 + self.expands


class Weights(str, enum.Enum):
    """How BF16 weights are kept: rounded to ``nearest``, by ``stochastic`` rounding, or as a 24-bit ``master``."""

    NEAREST = "nearest"
    STOCHASTIC = "stochastic"
    MASTER = "master"


def group_shape(shape: tuple[int, ...], group_size: int) -> tuple[int, ...]:
    """The shape of a moment's scales and expansions: one per group along the last dimension of ``shape``."""
    return (*shape[:-1], -(-shape[-1] // group_size)) if len(shape) else (1,)


def _to_groups(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """``x`` as [groups, values of a group], with zeros where the last group of a row is shorter."""
    columns = x.shape[-1] if x.dim() else 1
    width = min(group_size, max(columns, 1))
    x = x.reshape(x.numel() // max(columns, 1), columns)
    return pad(x, (0, -columns % width)).reshape(-1, width)


def _from_groups(groups: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The inverse of :func:`_to_groups`."""
    columns = shape[-1] if len(shape) else 1
    padded = max(round_up(columns, groups.shape[1]), 1)
    return groups.reshape(groups.numel() // padded, padded)[:, :columns].reshape(shape)


def spread(groups: torch.Tensor, shape: tuple[int, ...], group_size: int) -> torch.Tensor:
    """One value per group, of :func:`group_shape`, as one for each value of a tensor of ``shape``."""
    if not len(shape):
        return groups.view(())
    return groups.repeat_interleave(group_size, dim=-1)[..., : shape[-1]]


# --- E4M3, with and without expansion


def choose_expansion(magnitude: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The expansions, uint8 [N], of groups with magnitudes [N, W], the largest of each being ``scale`` [N]."""
    smallest = threshold(magnitude, 0.0, float("inf")).amin(dim=1).double()
    expansion = torch.floor(EXPANSION_BITS / (scale.double().log2() - smallest.log2())).clamp(1, 255)
    return torch.where(scale > 0, expansion, NO_EXPANSION).to(torch.uint8)


def encode_groups(groups: torch.Tensor, scale: torch.Tensor, expansion: torch.Tensor, positive: bool) -> torch.Tensor:
    """E4M3 codes, uint8, of float32 ``groups`` [N, W] without subnormals, under given scales and expansions [N]."""
    log_scale = scale.clamp(min=SMALLEST_NORMAL).log2()[:, None]
    y = groups.abs().log2_().sub_(log_scale).mul_(expansion.float()[:, None] / 16).add_(LOG2_LARGEST).exp2_()
    y.clamp_(max=LARGEST)
    if positive:
        y = torch.where(groups > 0, y.clamp_(min=SMALLEST_CODE), 0.0)
    return y.copysign_(groups).to(CODES).view(torch.uint8)


def decode_groups(codes: torch.Tensor, scale: torch.Tensor, expansion: torch.Tensor) -> torch.Tensor:
    """The float32 values of uint8 E4M3 ``codes`` [N, W] under scales and expansions [N]."""
    log_codes = LOG2_CODES.to(codes.device).index_select(0, codes.flatten().int()).view(codes.shape)
    root = log_codes.mul_(8 / expansion.float()[:, None]).exp2_()  # its square may be below 2**-126
    return root.copysign(codes.view(torch.int8)).mul_(scale[:, None]).mul_(root)


# --- lean


def _safe(scale: torch.Tensor) -> torch.Tensor:
    """A scale to divide by: that of a group of zeros is one."""
    return torch.where(scale >= SMALLEST_NORMAL, scale, 1.0)[:, None]


def encode_roots(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``lean`` codes, uint8 [N, W], and scales [N] of second moments [N, W] without subnormals."""
    root = v.sqrt()
    scale = root.amax(dim=1)
    codes = (root / _safe(scale)).sqrt_().mul_(255).round_()
    return torch.where(v > 0, codes.clamp_(1, 255), 0.0).to(torch.uint8), scale


def decode_roots(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Roots of the second moments, float32 [N, W]."""
    codes = codes.float()
    return codes * codes * (scale * (1 / 65025))[:, None]


def encode_ratios(m: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``lean`` codes, uint8 bits of int8 [N, W], and scales [N] of first moments beside second ones."""
    ratio = torch.where(v > 0, m / v.sqrt(), 0.0)
    scale = ratio.abs().amax(dim=1)
    scale = torch.where(scale >= SMALLEST_NORMAL, scale, scale * 0)
    return (ratio * (127 / _safe(scale))).round_().to(torch.int8).view(torch.uint8), scale


def decode_ratios(codes: torch.Tensor, scale: torch.Tensor, roots: torch.Tensor) -> torch.Tensor:
    """The float32 first moments [N, W] beside decoded ``roots`` of the second ones."""
    return codes.view(torch.int8).float() * (scale * (1 / 127))[:, None] * roots


def encode_companded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``lean`` codes, uint8 bits of int8 [N, W], and scales [N] of a moment that stands alone, without subnormals."""
    magnitude = x.abs()
    scale = magnitude.amax(dim=1)
    codes = (magnitude / _safe(scale)).sqrt_().mul_(127).round_()
    return codes.copysign_(x).to(torch.int8).view(torch.uint8), scale


def decode_companded(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The float32 values [N, W]."""
    codes = codes.view(torch.int8).float()
    return codes * codes.abs() * (scale * (1 / 16129))[:, None]


# --- moments of any shape

Encoded = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # codes, scale, expansion of a moment


def encode_moments(moments: list[torch.Tensor], group_size: int, format: StateFormat) -> list[Encoded]:
    """Encode the moments of a parameter by groups along its last dimension, as the head of this file says.

    Args:
        moments: Float32, of the parameter's shape: the first and the second one, or a first one alone.
        group_size: Values per group.
        format: How.

    Returns:
        For each moment ``(codes, scale, expansion)``: uint8 of its shape; then, of :func:`group_shape`, float32,
        and uint8 or, without expansion, None. A group with a value that is not
        finite has such a scale in one of its moments, and codes and expansions that mean nothing.
    """
    shape = moments[0].shape
    groups = [hardshrink(_to_groups(x, group_size), LARGEST_SUBNORMAL) for x in moments]
    if format is StateFormat.LEAN:
        first = encode_companded(groups[0]) if len(groups) == 1 else encode_ratios(*groups)
        encoded = [(*first, None), *((*encode_roots(v), None) for v in groups[1:])]
    else:
        encoded = []
        for i, x in enumerate(groups):
            magnitude = x.abs()
            scale = magnitude.amax(dim=1)
            plain = torch.full_like(scale, NO_EXPANSION, dtype=torch.uint8)
            expansion = choose_expansion(magnitude, scale) if format.expands else plain
            codes = encode_groups(x, scale, expansion, positive=i == 1)
            encoded.append((codes, scale, expansion if format.expands else None))
    side = group_shape(shape, group_size)
    return [
        (_from_groups(codes, shape), scale.view(side), None if expansion is None else expansion.view(side))
        for codes, scale, expansion in encoded
    ]


def decode_moments(encoded: list[Encoded], group_size: int, format: StateFormat) -> list[torch.Tensor]:
    """The float32 moments of a parameter; undoes :func:`encode_moments` but for the rounding."""
    shape = encoded[0][0].shape
    groups = [(_to_groups(codes, group_size), scale.flatten(), expansion) for codes, scale, expansion in encoded]
    if format is not StateFormat.LEAN:
        plain = torch.tensor(NO_EXPANSION, device=encoded[0][0].device)
        moments = [
            decode_groups(codes, scale, plain.expand_as(scale) if expansion is None else expansion.flatten())
            for codes, scale, expansion in groups
        ]
    elif len(groups) == 1:
        moments = [decode_companded(*groups[0][:2])]
    else:
        roots = decode_roots(*groups[1][:2])
        moments = [decode_ratios(*groups[0][:2], roots), roots * roots]
    return [_from_groups(x, shape) for x in moments]


def slabs(param: torch.Tensor, *others: torch.Tensor | None) -> Iterator[tuple]:
    """A parameter, and what has as many rows, in pieces of whole rows that a CPU's cache holds with their temporaries.

    Yields:
        The index of the first value in ``param``, then the pieces; what is None stays None.
    """
    if param.dim() < 2 or param.numel() <= SLAB:
        yield 0, param, *others
        return
    row = param.numel() // param.shape[0]
    for i in range(0, param.shape[0], max(1, SLAB // row)):
        rows = slice(i, i + max(1, SLAB // row))
        yield i * row, *(t if t is None else t[rows] for t in (param, *others))


# --- weights


def largest_magnitude(param: torch.Tensor) -> torch.Tensor:
    """The largest magnitude in a parameter, one number; NaN where it has one, zero where it has no values."""
    return param.abs().amax() if param.numel() else param.new_zeros(())


def weight_key(seed: int, parameter: int, step: torch.Tensor) -> torch.Tensor:
    """What stochastic rounding of one parameter in one step hashes with each index: int64 below 2**32.

    Args:
        seed: The run's, any integer.
        parameter: The number of the parameter among those of the run.
        step: The number of its step, one number on any device.
    """
    return hashed(step.long(), hashed(parameter, hashed(seed, 1)))


def mixed(index: torch.Tensor | int) -> torch.Tensor | int:
    """What an index adds to the key of its hash: the sum of those of two indices is that of their sum, but for bits
    above the lowest 32, if that sum is below 2**32."""
    return index * 0x9E3779B1 + (index >> 32) * 0x85EBCA77


def hashed(index: torch.Tensor | int, key: torch.Tensor | int) -> torch.Tensor | int:
    """32 bits of chance, as integers below 2**32, for each int64 ``index`` under a key (murmur3's finalizer)."""
    x = (mixed(index) + key) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # in place, where it is a tensor
        x ^= x >> shift
        x *= factor
        x &= 0xFFFFFFFF
    x ^= x >> 16
    return x


def round_stochastically(x: torch.Tensor, key: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Float32 ``x`` as BF16: up with a probability of the distance to the lower neighbour over that between both.

    ``first`` is the index of its first value in the whole of the parameter.
    """
    index = torch.arange(first, first + x.numel(), device=x.device)
    chance = hashed(index, key.to(x.device)).view(x.shape) >> 16
    bits = x.contiguous().view(torch.int32) + chance.int()
    return (bits & -65536).view(torch.float32).bfloat16()


def split_master(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 ``x`` in 24 bits: the nearest BF16 number, and a residual, uint8 bits of int8."""
    bits = x.contiguous().view(torch.int32)
    magnitude = ((bits & 0x7FFFFFFF) + 0x80) & ~0xFF
    high = (magnitude + 0x8000) & -65536
    residual = ((magnitude - high) >> 8).to(torch.int8).view(torch.uint8)
    return (high | (bits & -(2**31))).view(torch.float32).bfloat16(), residual


def join_master(param: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """The float32 weights of BF16 ``param`` and its residual."""
    bits = param.float().contiguous().view(torch.int32)
    magnitude = (bits & 0x7FFFFFFF) + (residual.view(torch.int8).int() << 8)
    return (magnitude.clamp_(min=0) | (bits & -(2**31))).view(torch.float32)


def read_weights(param: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """Float32 weights of a parameter; ``residual`` is None but for :attr:`Weights.MASTER` of BF16."""
    return param.float() if residual is None else join_master(param, residual)


def round_weights(
    new: torch.Tensor, dtype: torch.dtype, weights: Weights, key: torch.Tensor, first: int = 0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """New float32 weights as a parameter of ``dtype`` keeps them, from index ``first`` on, and the residual if that
    has one."""
    if dtype == torch.float32 or weights is Weights.NEAREST:
        return new.to(dtype), None
    return split_master(new) if weights is Weights.MASTER else (round_stochastically(new, key, first), None)
