"""Activations that keep FP8: ``h = act(x) * up``, its gradient, and its transposed codes, from FP8 groups of x and up.

    forward             x, up [T, I]    ->  h [T, I], or its codes with a scale per token; x and up as FP8 groups
    backward            dh, the groups  ->  gradients of x and up, [T, 2I], or their codes with a scale per token
    weight gradient     the groups      ->  codes of h at a given scale, transposed, or the values of h

h itself is never kept: it is elementwise, so it comes back from the groups, a quarter of the bytes of x, up and h in
BF16. A kept tensor is E4M3 codes and the stored scales of groups of G neighbours; x and up lie side by side, x's codes
in the first I columns and up's in the last I, their scales likewise. Without ``up`` there is only x, and
``h = act(x)``. (COAT, arXiv 2410.19313 section 4.1, keeps the inputs of act and of the product, and h, per 1 x 16.)

    silu        x * sigmoid(x)              gelu        x * (1 + erf(x / sqrt(2))) / 2
    gelu_tanh   x * sigmoid(2 u),  u = sqrt(2 / pi) * (x + 0.044715 x**3), which is x * (1 + tanh(u)) / 2
    quick_gelu  x * sigmoid(1.702 x)        relu, relu2 (its square), identity

All arithmetic is float32 and each result is rounded once. Stated outcomes: every activation of 0 is 0; the slope of
relu at 0 is 0, as torch has it. A NaN in x or up, or an infinity whose limit torch does not take either (silu of
-inf), is NaN in h, which makes the scale of its token NaN. A group that holds a NaN or an infinity is kept as NaN as
a whole: its values, and what follows from them in the backward, are NaN, never plausible numbers; the relu of a NaN,
and its slope, are NaN.
"""

import math
from typing import NamedTuple

import torch

from ._registry import register
from .formats import FP8_DTYPES, SCALE_DTYPES, Granularity, encode, round_up, unpack_scale
from .quantize import SOURCE_DTYPES, _per_value, _transposed, quantize_ref

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "identity")
GROUP_SIZES = (16, 32, 64, 128, 256)
E4M3 = torch.float8_e4m3fn


class Activation(NamedTuple):
    """What :func:`activation` returns: values, their codes and scales, and the kept inputs. None: not asked for."""

    h: torch.Tensor | None
    h_q: torch.Tensor | None
    h_s: torch.Tensor | None
    kept_q: torch.Tensor | None
    kept_s: torch.Tensor | None


# --- What the three ops share ---


def value_and_slope(x: torch.Tensor, act: str) -> tuple[torch.Tensor, torch.Tensor]:
    """``act(x)`` and its derivative, in the dtype of ``x``."""
    if act == "identity":
        return x, torch.ones_like(x)
    if act in ("relu", "relu2"):
        y = torch.where(x <= 0, 0.0, x)
        return (y, torch.where(x > 0, 1.0, y)) if act == "relu" else (y * y, 2.0 * y)
    if act == "gelu":
        cdf = 0.5 + 0.5 * torch.erf(x * math.sqrt(0.5))
        return x * cdf, cdf + x * torch.exp(-0.5 * x * x) * math.sqrt(0.5 / math.pi)
    # the others are x * sigmoid(z) with z = x, 1.702 x, or 2 u
    z, dz = x, 1.0
    if act == "quick_gelu":
        z, dz = 1.702 * x, 1.702
    elif act == "gelu_tanh":
        near = x.clamp(-16, 16)  # where sigmoid is 0 or 1 already, so that the cube cannot overflow
        z = near * (math.sqrt(8 / math.pi) + 0.044715 * math.sqrt(8 / math.pi) * near * near)
        dz = math.sqrt(8 / math.pi) + 3 * 0.044715 * math.sqrt(8 / math.pi) * near * near
    s = torch.sigmoid(z)
    y = x * s
    return y, s + y * (1.0 - s) * dz


def _token_codes(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of ``quantize(x, dtype, "token")``."""
    return quantize_ref(x, dtype, Granularity.TOKEN, 0, True, None, True, False)[::2]


def _keep(x: torch.Tensor, group_size: int, scale_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [T, W] and stored scales [T, ceil(W / G)] of groups of ``x``."""
    power_of_two = scale_dtype == torch.uint8
    return quantize_ref(x, E4M3, Granularity.GROUP, group_size, power_of_two, None, True, False, scale_dtype)[::2]


def _restore(kept_q, kept_s, gated: bool, group_size: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Float32 x and up (None where not gated) of kept groups."""
    parts = 2 if gated else 1
    width, groups = kept_q.shape[1] // parts, kept_s.shape[1] // parts
    values = []
    for part in range(parts):
        scale = unpack_scale(kept_s[:, part * groups : (part + 1) * groups])
        codes = kept_q[:, part * width : (part + 1) * width].float()
        values.append(codes * _per_value(scale, width, group_size))
    return values[0], values[1] if gated else None


def _check_act(name, act):
    if act not in ACTIVATIONS:
        raise ValueError(f"{name}: act is {act!r}, expected one of {', '.join(map(repr, ACTIVATIONS))}")


def _check_kept(name, kept_q, kept_s, act, gated, group_size):
    _check_act(name, act)
    if group_size not in GROUP_SIZES:
        raise ValueError(f"{name}: group_size is {group_size}, expected one of {', '.join(map(str, GROUP_SIZES))}")
    parts = 2 if gated else 1
    if kept_q.dtype != E4M3 or kept_q.dim() != 2 or kept_q.shape[1] % parts:
        raise TypeError(
            f"{name}: kept_q is {kept_q.dtype} {list(kept_q.shape)}, expected E4M3 codes "
            f"{'[T, 2I], x and up side by side' if gated else '[T, I]'}; gated must be as it was in activation"
        )
    expected = [kept_q.shape[0], parts * -(-(kept_q.shape[1] // parts) // group_size)]
    if kept_s.dtype not in SCALE_DTYPES or list(kept_s.shape) != expected:
        raise ValueError(
            f"{name}: kept_s is {kept_s.dtype} {list(kept_s.shape)}, expected {expected} of uint8 (E8M0), bfloat16 or "
            f"float32 for kept_q {list(kept_q.shape)}, gated={gated} and group_size={group_size}"
        )


# --- h, its codes, the kept groups ---


def _check_activation(x, up, act, group_size, scale_dtype):
    _check_act("activation", act)
    if x.dtype not in SOURCE_DTYPES:
        raise TypeError(f"activation: x is {x.dtype}, expected one of {', '.join(map(str, SOURCE_DTYPES))}")
    if up is not None and (up.shape != x.shape or up.dtype != x.dtype):
        raise ValueError(
            f"activation: up is {up.dtype} {list(up.shape)}, expected the dtype and shape of x, {x.dtype} "
            f"{list(x.shape)}"
        )
    if group_size and group_size not in GROUP_SIZES:
        raise ValueError(
            f"activation: group_size is {group_size}, expected one of {', '.join(map(str, GROUP_SIZES))}, or 0 to "
            "keep nothing"
        )
    if scale_dtype not in SCALE_DTYPES:
        raise TypeError(
            f"activation: scale_dtype is {scale_dtype}, expected torch.uint8 (E8M0), torch.bfloat16 or torch.float32"
        )


def activation_ref(x, up, act, group_size, scale_dtype, values, codes):
    h = value_and_slope(x.float(), act)[0]
    h = (h if up is None else h * up.float()).to(x.dtype)
    h_q, h_s = _token_codes(h, E4M3) if codes else (h.new_empty(0, dtype=E4M3), h.new_empty(0, dtype=torch.float32))
    kept = [(h.new_empty(0, dtype=E4M3), h.new_empty(0, dtype=scale_dtype))]
    if group_size:
        kept = [_keep(part, group_size, scale_dtype) for part in (x, up) if part is not None]
    parts_q, parts_s = zip(*kept, strict=True)
    kept_q, kept_s = parts_q[0], parts_s[0]
    if len(kept) > 1:
        kept_q = torch.cat([q.view(torch.uint8) for q in parts_q], dim=1).view(E4M3)  # autocast knows no FP8
        kept_s = torch.cat(parts_s, dim=1)
    if not values:
        h = h.new_empty(0)
    elif h is x:  # the identity of float32: an op returns fresh memory
        h = h.clone()
    return h, h_q, h_s, kept_q, kept_s


def _activation_fake(x, up, act, group_size, scale_dtype, values, codes):
    tokens, width = x.shape
    parts = 1 if up is None else 2
    groups = -(-width // group_size) if group_size else 0
    return (
        x.new_empty((tokens, width) if values else 0),
        x.new_empty((tokens, width) if codes else 0, dtype=E4M3),
        x.new_empty((tokens, 1) if codes else 0, dtype=torch.float32),
        x.new_empty((tokens, parts * width) if group_size else 0, dtype=E4M3),
        x.new_empty((tokens, parts * groups) if group_size else 0, dtype=scale_dtype),
    )


_activation = register(
    "activation(Tensor x, Tensor? up, str act, int group_size, ScalarType scale_dtype, bool values, bool codes) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    activation_ref,
    _activation_fake,
    "activation_triton:activation",
)


def activation(
    x: torch.Tensor,
    up: torch.Tensor | None = None,
    *,
    act: str,
    group_size: int = 0,
    scale_dtype: torch.dtype = torch.uint8,
    values: bool = True,
    codes: bool = False,
) -> Activation:
    """``h = act(x) * up``, or ``act(x)``: as values, as codes with a scale per token, and with x and up kept as FP8.

    Args:
        x: BF16, FP32 or FP16 [..., I], the input of the activation (the gate); leading dimensions are flattened to T
            tokens. It may be a slice of columns of a wider matrix.
        up: The factor, of the same shape and dtype, or None.
        act: One of ``ACTIVATIONS``.
        group_size: Values per scale of the kept x and up, a power of two from 16 to 256; 0 keeps nothing.
        scale_dtype: How their scales are stored: ``torch.uint8`` (E8M0), ``torch.bfloat16`` or ``torch.float32``.
        values: Whether to return h.
        codes: Whether to return the codes of h: what ``quantize(h, E4M3, "token")`` returns for the rounded h.

    Returns:
        ``Activation(h, h_q, h_s, kept_q, kept_s)``: h [T, I] in the dtype of x, its E4M3 codes [T, I] and power-of-two
        scales, float32 [T, 1], the E4M3 codes [T, n * I] of x and up side by side (n = 1 without up) and their scales
        [T, n * ceil(I / G)]. What was not asked for is None.

    Raises:
        TypeError, ValueError: For activations, dtypes or shapes that do not fit; the message names the value.
    """
    x = x.reshape(-1, x.shape[-1])
    up = None if up is None else up.reshape(-1, up.shape[-1])
    _check_activation(x, up, act, group_size, scale_dtype)
    h, h_q, h_s, kept_q, kept_s = _activation(x, up, act, group_size, scale_dtype, values, codes)
    kept = (kept_q, kept_s) if group_size else (None, None)
    return Activation(h if values else None, *((h_q, h_s) if codes else (None, None)), *kept)


# --- The gradient ---


def activation_backward_ref(dh, kept_q, kept_s, act, gated, group_size, codes, code_dtype, out_dtype):
    x, up = _restore(kept_q, kept_s, gated, group_size)
    y, slope = value_and_slope(x, act)
    dh = dh.float()
    d = torch.cat((dh * up * slope, dh * y), dim=1) if gated else dh * slope
    if codes:  # of values that were rounded to out_dtype
        return d.new_empty(0, dtype=out_dtype), *_token_codes(d.to(out_dtype), code_dtype)
    return d.to(out_dtype), d.new_empty(0, dtype=code_dtype), d.new_empty(0)


def _activation_backward_fake(dh, kept_q, kept_s, act, gated, group_size, codes, code_dtype, out_dtype):
    return (
        dh.new_empty(0 if codes else kept_q.shape, dtype=out_dtype),
        dh.new_empty(kept_q.shape if codes else 0, dtype=code_dtype),
        dh.new_empty((kept_q.shape[0], 1) if codes else 0, dtype=torch.float32),
    )


_activation_backward = register(
    "activation_backward(Tensor dh, Tensor kept_q, Tensor kept_s, str act, bool gated, int group_size, bool codes, "
    "ScalarType code_dtype, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)",
    activation_backward_ref,
    _activation_backward_fake,
    "activation_triton:activation_backward",
)


def activation_backward(
    dh: torch.Tensor,
    kept_q: torch.Tensor,
    kept_s: torch.Tensor,
    *,
    act: str,
    gated: bool,
    group_size: int,
    codes: bool = False,
    code_dtype: torch.dtype = E4M3,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of x and up, side by side, from the output gradient and the kept groups.

        dx = dh * up * act'(x)        dup = dh * act(x)

    Args:
        dh: BF16, FP32 or FP16 [..., I], the gradient of h; leading dimensions are flattened to T tokens.
        kept_q: E4M3 codes of x and up from :func:`activation`, [T, n * I].
        kept_s: Their scales [T, n * ceil(I / G)].
        act: The activation of the forward.
        gated: Whether there was an ``up`` (n = 2).
        group_size: The group size of the forward.
        codes: Return codes with one scale per token over all n * I columns, not values: the operand of the matrix
            products that follow.
        code_dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``, of the codes.
        out_dtype: Of the values, or what they are rounded to before codes are made; by default the dtype of ``dh``.

    Returns:
        ``(d, d_q, d_s)``: values [T, n * I], or codes [T, n * I] and power-of-two scales, float32 [T, 1]. What was not
        asked for is None.

    Raises:
        TypeError, ValueError: For activations, dtypes or shapes that do not fit; the message names the value.
    """
    dh = dh.reshape(-1, dh.shape[-1])
    out_dtype = out_dtype or dh.dtype
    _check_kept("activation_backward", kept_q, kept_s, act, gated, group_size)
    for name, dtype in (("dh", dh.dtype), ("out_dtype", out_dtype)):
        if dtype not in SOURCE_DTYPES:
            expected = ", ".join(map(str, SOURCE_DTYPES))
            raise TypeError(f"activation_backward: {name} is {dtype}, expected one of {expected}")
    if code_dtype not in FP8_DTYPES:
        raise TypeError(
            f"activation_backward: code_dtype is {code_dtype}, expected torch.float8_e4m3fn or torch.float8_e5m2"
        )
    expected = [kept_q.shape[0], kept_q.shape[1] // (2 if gated else 1)]
    if list(dh.shape) != expected:
        raise ValueError(
            f"activation_backward: dh is {list(dh.shape)}, expected {expected} for kept_q {list(kept_q.shape)} and "
            f"gated={gated}"
        )
    d, d_q, d_s = _activation_backward(dh, kept_q, kept_s, act, gated, group_size, codes, code_dtype, out_dtype)
    return (None, d_q, d_s) if codes else (d, None, None)


# --- h again: transposed codes, or values ---


def activation_transposed_ref(kept_q, kept_s, scale, act, gated, group_size):
    x, up = _restore(kept_q, kept_s, gated, group_size)
    h = value_and_slope(x, act)[0]
    return _transposed(encode(h if up is None else h * up, 1.0 / scale, E4M3))


_activation_transposed = register(
    "activation_transposed(Tensor kept_q, Tensor kept_s, Tensor scale, str act, bool gated, int group_size) -> Tensor",
    activation_transposed_ref,
    lambda kept_q, kept_s, scale, act, gated, group_size: kept_q.new_empty(
        (kept_q.shape[1] // (2 if gated else 1), round_up(kept_q.shape[0], 16))
    ),
    "activation_triton:activation_transposed",
)


def activation_transposed(
    kept_q: torch.Tensor, kept_s: torch.Tensor, scale: torch.Tensor, *, act: str, gated: bool, group_size: int
) -> torch.Tensor:
    """Codes of h, recomputed from the kept groups, at a given scale and transposed: operand of the weight gradient.

    With ``act="identity"`` and ``gated=False`` it moves FP8 groups to transposed codes of one scale.

    Args:
        kept_q: E4M3 codes of x and up from :func:`activation`, [T, n * I].
        kept_s: Their scales [T, n * ceil(I / G)].
        scale: Float32 [1, 1]. Values beyond ``448 * scale`` are held there. The recomputed h can be larger than the
            forward's, as each kept factor is off by up to 2**-4 of itself: the largest scale of the forward's tokens
            may cut a little off its largest values.
        act: The activation of the forward.
        gated: Whether there was an ``up`` (n = 2).
        group_size: The group size of the forward.

    Returns:
        E4M3 codes [I, round_up(T, 16)] with zeros beyond T.

    Raises:
        TypeError, ValueError: For activations, dtypes or shapes that do not fit; the message names the value.
    """
    _check_kept("activation_transposed", kept_q, kept_s, act, gated, group_size)
    if scale.dtype != torch.float32 or tuple(scale.shape) != (1, 1):
        raise ValueError(
            f"activation_transposed: scale is {scale.dtype} {list(scale.shape)}, expected torch.float32 [1, 1]"
        )
    return _activation_transposed(kept_q, kept_s, scale, act, gated, group_size)


def activation_values_ref(kept_q, kept_s, act, gated, group_size, dtype):
    x, up = _restore(kept_q, kept_s, gated, group_size)
    h = value_and_slope(x, act)[0]
    return (h if up is None else h * up).to(dtype)


_activation_values = register(
    "activation_values(Tensor kept_q, Tensor kept_s, str act, bool gated, int group_size, ScalarType dtype) -> Tensor",
    activation_values_ref,
    lambda kept_q, kept_s, act, gated, group_size, dtype: kept_q.new_empty(
        (kept_q.shape[0], kept_q.shape[1] // (2 if gated else 1)), dtype=dtype
    ),
    "activation_triton:activation_values",
)


def activation_values(
    kept_q: torch.Tensor, kept_s: torch.Tensor, *, act: str, gated: bool, group_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """h, recomputed from the kept groups: in float32, and rounded once.

    Args:
        kept_q, kept_s, act, gated, group_size: As of :func:`activation_transposed`.
        dtype: ``torch.bfloat16``, ``torch.float32`` or ``torch.float16``.

    Returns:
        h [T, I] in ``dtype``.

    Raises:
        TypeError, ValueError: For activations, dtypes or shapes that do not fit; the message names the value.
    """
    _check_kept("activation_values", kept_q, kept_s, act, gated, group_size)
    if dtype not in SOURCE_DTYPES:
        expected = ", ".join(map(str, SOURCE_DTYPES))
        raise TypeError(f"activation_values: dtype is {dtype}, expected one of {expected}")
    return _activation_values(kept_q, kept_s, act, gated, group_size, dtype)
