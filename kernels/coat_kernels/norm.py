"""RMSNorm and LayerNorm of tokens x [T, H] that keep their input as FP8 groups and hand their output on as FP8 codes.

    mean = mean_H(x) with center, else 0        rstd = 1 / sqrt(mean_H((x - mean)**2) + eps)
    xhat = (x - mean) * rstd                    y = xhat * (weight + offset) + bias

    kept            x_q [T, H] E4M3 codes, x_s [T, ceil(H / G)] their groups' scales; mean and rstd, float32 [T]
    handed on       y, and if asked for y_q [T, H] E4M3 codes with scales y_s [T, 1]: the next linear layers' operand
    input gradient  g = dy * (weight + offset);  dx = rstd * (g - xhat * mean_H(g * xhat) - mean_H(g) with center)
    weight, bias    dw = sum_T(dy * xhat);  db = sum_T(dy)

The backward takes xhat from the kept codes, and mean and rstd as the forward had them. The output is not kept: what
the next linear layer's backward needs of it, transposed codes for a weight gradient or values for a LoRA adapter, is
made again from the kept input.

COAT keeps the inputs of non-linear layers as groups of 1 x 16 (arXiv 2410.19313, section 4.1). There the norm computes
from FP8 too; here it computes from the tokens as they came, at the same bytes kept.

Stated outcomes. A token of zeros gives zeros (or the bias). A token with a NaN, an inf, or squares that overflow
float32 gets rstd = NaN, so that its whole row of y, of dx and of the codes is NaN, and dw: a broken number is never
turned into a plausible one. Other tokens do not see it.
"""

from typing import NamedTuple

import torch

from ._registry import register
from .formats import SCALE_DTYPES, Granularity, round_up
from .quantize import dequantize_ref, quantize_ref, scale_shape

VALUE_DTYPES = (torch.bfloat16, torch.float32)
E4M3 = torch.float8_e4m3fn
MOST_IN_A_GROUP = 4096  # values that a kernel sees at a time
GROUP, TOKEN, TENSOR = Granularity.GROUP.value, Granularity.TOKEN.value, Granularity.TENSOR.value


class Norm(NamedTuple):
    """What :func:`norm` returns; what was not asked for is None."""

    y: torch.Tensor
    y_q: torch.Tensor | None
    y_s: torch.Tensor | None
    x_q: torch.Tensor | None
    x_s: torch.Tensor | None
    mean: torch.Tensor | None
    rstd: torch.Tensor


def _check_values(name: str, **tensors: torch.Tensor | None):
    for key, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in VALUE_DTYPES:
            raise TypeError(f"{name}: {key} is {tensor.dtype}, expected torch.bfloat16 or torch.float32")


def _check_dtype(name: str, key: str, dtype: torch.dtype):
    if dtype not in VALUE_DTYPES:
        raise TypeError(f"{name}: {key} is {dtype}, expected torch.bfloat16 or torch.float32")


def _check_vectors(name: str, width: int, offset: float, weight, bias):
    for key, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and tuple(vector.shape) != (width,):
            raise ValueError(f"{name}: {key} is {list(vector.shape)}, expected [{width}], the last size of x")
    if offset and weight is None:
        raise ValueError(f"{name}: offset is {offset} but weight is None; without a weight leave offset at 0")


def _check_group(name: str, group_size: int, smallest: int):
    if not smallest <= group_size <= MOST_IN_A_GROUP or group_size & (group_size - 1):
        zero = "" if smallest else ", or 0 to keep nothing"
        raise ValueError(f"{name}: group_size is {group_size}, expected a power of two up to {MOST_IN_A_GROUP}{zero}")


def _check_kept(name: str, x_q, x_s, mean, rstd, group_size):
    _check_group(name, group_size, 1)
    if x_q.dtype != E4M3 or x_q.dim() != 2:
        raise TypeError(f"{name}: x_q is {x_q.dtype} {list(x_q.shape)}, expected torch.float8_e4m3fn codes [T, H]")
    shape = scale_shape(*x_q.shape, GROUP, group_size)
    if x_s.dtype not in SCALE_DTYPES or tuple(x_s.shape) != shape:
        raise ValueError(
            f"{name}: x_s is {x_s.dtype} {list(x_s.shape)}, expected {list(shape)} of "
            f"{', '.join(map(str, SCALE_DTYPES))} for codes {list(x_q.shape)} and group_size {group_size}"
        )
    for key, value in (("mean", mean), ("rstd", rstd)):
        if value is not None and (value.dtype != torch.float32 or tuple(value.shape) != shape[:1]):
            raise ValueError(
                f"{name}: {key} is {value.dtype} {list(value.shape)}, expected torch.float32 [{shape[0]}]"
            )


def _flat(name: str, x: torch.Tensor) -> torch.Tensor:
    """Values [..., H] as [T, H]."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name}: a tensor {list(x.shape)} has no values to norm, expected [..., H] with H > 0")
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _affine(xhat, weight, bias, offset):
    """``xhat * (weight + offset) + bias`` in float32."""
    y = xhat if weight is None else xhat * (weight.float() + offset)
    return y if bias is None else y + bias.float()


def norm_ref(x, weight, bias, eps, center, offset, round_first, out_dtype, group_size, scale_dtype, codes):
    centered, mean = x.float(), x.new_empty(0, dtype=torch.float32)
    if center:
        mean = centered.mean(1)
        centered = centered - mean[:, None]
    square = centered.square().mean(1)
    rstd = torch.where(square.isfinite(), (square + eps).rsqrt(), float("nan"))
    xhat = centered * rstd[:, None]
    y = _affine(xhat.to(x.dtype).float() if round_first else xhat, weight, bias, offset).to(out_dtype)
    y_q, x_q = x.new_empty(0, dtype=E4M3), x.new_empty(0, dtype=E4M3)
    y_s, x_s = x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=scale_dtype)
    if codes:
        y_q, _, y_s = quantize_ref(y, E4M3, TOKEN, 0, True, None, True, False)
    if group_size:
        power_of_two = scale_dtype == torch.uint8
        x_q, _, x_s = quantize_ref(x, E4M3, GROUP, group_size, power_of_two, None, True, False, scale_dtype)
    return y, y_q, y_s, x_q, x_s, mean, rstd


def _norm_fake(x, weight, bias, eps, center, offset, round_first, out_dtype, group_size, scale_dtype, codes):
    tokens, width = x.shape
    return (
        x.new_empty((tokens, width), dtype=out_dtype),
        x.new_empty((tokens, width) if codes else 0, dtype=E4M3),
        x.new_empty((tokens, 1) if codes else 0, dtype=torch.float32),
        x.new_empty((tokens, width) if group_size else 0, dtype=E4M3),
        x.new_empty(scale_shape(tokens, width, GROUP, group_size) if group_size else 0, dtype=scale_dtype),
        x.new_empty(tokens if center else 0, dtype=torch.float32),
        x.new_empty(tokens, dtype=torch.float32),
    )


_norm = register(
    "norm(Tensor x, Tensor? weight, Tensor? bias, float eps, bool center, float offset, bool round_first, "
    "ScalarType out_dtype, int group_size, ScalarType scale_dtype, bool codes) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    norm_ref,
    _norm_fake,
    "norm_triton:norm",
)


def norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
    center: bool = False,
    offset: float = 0.0,
    round_first: bool = True,
    out_dtype: torch.dtype | None = None,
    group_size: int = 0,
    scale_dtype: torch.dtype = torch.uint8,
    codes: bool = False,
) -> Norm:
    """RMSNorm or LayerNorm: ``y = (x - mean) / sqrt(var + eps) * (weight + offset) + bias``.

    Args:
        x: BF16 or FP32 values [..., H]; the leading dimensions are flattened to T tokens. Rows may lie apart.
        weight: BF16 or FP32 [H], or None.
        bias: BF16 or FP32 [H], or None.
        eps: Added to the mean square.
        center: Subtract the mean: LayerNorm. RMSNorm otherwise, whose mean is taken to be 0.
        offset: Added to the weight: 1 where the stored weight is the difference from 1 (Gemma).
        round_first: Round ``xhat`` to the dtype of ``x`` before it is multiplied (Llama); False computes all in
            float32 and rounds once (Gemma, OLMo 2, every LayerNorm).
        out_dtype: Dtype of ``y``. By default what transformers' modules return: with ``round_first`` the common dtype
            of ``x`` and ``weight``, otherwise that of ``x``.
        group_size: Keep ``x`` as FP8 groups of so many values along H, a power of two; 0 keeps nothing of ``x``.
        scale_dtype: How the groups' scales are stored: ``torch.uint8`` (E8M0, powers of two), ``torch.bfloat16`` or
            ``torch.float32``.
        codes: Whether to return ``y`` quantized per token too, exactly as ``quantize(y)`` does.

    Returns:
        ``Norm(y, y_q, y_s, x_q, x_s, mean, rstd)``: y [T, H]; y_q [T, H] E4M3 with float32 y_s [T, 1]; x_q [T, H]
        E4M3 with x_s [T, ceil(H / G)]; mean and rstd, float32 [T]. What was not asked for is None.

    Raises:
        TypeError, ValueError: For dtypes, shapes or group sizes that do not fit; the message names the value.
    """
    x = _flat("norm", x)
    if out_dtype is None:
        common = round_first and weight is not None
        out_dtype = torch.promote_types(x.dtype, weight.dtype) if common else x.dtype
    _check_values("norm", x=x, weight=weight, bias=bias)
    _check_dtype("norm", "out_dtype", out_dtype)
    _check_vectors("norm", x.shape[1], offset, weight, bias)
    _check_group("norm", group_size, 0)
    if scale_dtype not in SCALE_DTYPES:
        raise TypeError(f"norm: scale_dtype is {scale_dtype}, expected one of {', '.join(map(str, SCALE_DTYPES))}")
    y, y_q, y_s, x_q, x_s, mean, rstd = _norm(
        x, weight, bias, float(eps), center, float(offset), round_first, out_dtype, group_size, scale_dtype, codes
    )
    handed = (y_q, y_s) if codes else (None, None)
    kept = (x_q, x_s) if group_size else (None, None)
    return Norm(y, *handed, *kept, mean if center else None, rstd)


def _kept_xhat(x_q, x_s, mean, rstd, group_size):
    x = dequantize_ref(x_q, x_s, group_size, torch.float32)
    return (x if mean is None else x - mean[:, None]) * rstd[:, None]


def norm_backward_ref(dy, x_q, x_s, mean, rstd, weight, offset, group_size, dx_dtype, dw, db):
    xhat = _kept_xhat(x_q, x_s, mean, rstd, group_size)
    dy = dy.float()
    g = _affine(dy, weight, None, offset)
    dx = g - xhat * (g * xhat).mean(1, keepdim=True)
    if mean is not None:
        dx = dx - g.mean(1, keepdim=True)
    sums = dy.new_empty(dw + db, dy.shape[1])
    if dw:
        sums[0] = (dy * xhat).sum(0)
    if db:
        sums[-1] = dy.sum(0)
    return (dx * rstd[:, None]).to(dx_dtype), sums


_norm_backward = register(
    "norm_backward(Tensor dy, Tensor x_q, Tensor x_s, Tensor? mean, Tensor rstd, Tensor? weight, float offset, "
    "int group_size, ScalarType dx_dtype, bool dw, bool db) -> (Tensor, Tensor)",
    norm_backward_ref,
    lambda dy, x_q, x_s, mean, rstd, weight, offset, group_size, dx_dtype, dw, db: (
        dy.new_empty(x_q.shape, dtype=dx_dtype),
        dy.new_empty((dw + db, x_q.shape[1]), dtype=torch.float32),
    ),
    "norm_triton:norm_backward",
)


def norm_backward(
    dy: torch.Tensor,
    x_q: torch.Tensor,
    x_s: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    offset: float = 0.0,
    group_size: int,
    dx_dtype: torch.dtype,
    bias: bool = False,
    dw: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of :func:`norm`: ``dx = rstd * (g - xhat * mean_H(g * xhat) - mean_H(g))``.

    Here g = dy * (weight + offset), and the last term belongs to LayerNorm, which is what it was if ``mean`` is given.
    Sums over tokens are made in a fixed order: equal inputs on the same device give equal bits.

    Args:
        dy: BF16 or FP32 gradient of y [..., H] with T tokens. Rows may lie apart.
        x_q: E4M3 codes of the input [T, H].
        x_s: Their groups' scales [T, ceil(H / G)], E8M0 (uint8), BF16 or FP32.
        mean: float32 [T] of a LayerNorm, None of an RMSNorm.
        rstd: float32 [T].
        weight: BF16 or FP32 [H], or None.
        offset: As in the forward.
        group_size: G.
        dx_dtype: ``torch.bfloat16`` or ``torch.float32``.
        bias: Whether to return the gradient of a bias.
        dw: Whether to return the gradient of the weight, if there is one.

    Returns:
        ``(dx, dw, db)``: dx [T, H] in ``dx_dtype``; dw and db, float32 [H], or None.

    Raises:
        TypeError, ValueError: For dtypes or shapes that do not fit; the message names the value.
    """
    dy = _flat("norm_backward", dy)
    _check_kept("norm_backward", x_q, x_s, mean, rstd, group_size)
    _check_values("norm_backward", dy=dy, weight=weight)
    _check_dtype("norm_backward", "dx_dtype", dx_dtype)
    _check_vectors("norm_backward", x_q.shape[1], offset, weight, None)
    if dy.shape != x_q.shape:
        raise ValueError(f"norm_backward: dy is {list(dy.shape)}, expected {list(x_q.shape)}, the shape of x_q")
    dw = dw and weight is not None
    dx, sums = _norm_backward(dy, x_q, x_s, mean, rstd, weight, float(offset), group_size, dx_dtype, dw, bias)
    return dx, sums[0] if dw else None, sums[-1] if bias else None


def norm_transposed_ref(x_q, x_s, mean, rstd, weight, bias, scale, offset, group_size):
    y = _affine(_kept_xhat(x_q, x_s, mean, rstd, group_size), weight, bias, offset)
    return quantize_ref(y, E4M3, TENSOR, 0, True, scale, False, True)[1]


_norm_transposed = register(
    "norm_transposed(Tensor x_q, Tensor x_s, Tensor? mean, Tensor rstd, Tensor? weight, Tensor? bias, Tensor scale, "
    "float offset, int group_size) -> Tensor",
    norm_transposed_ref,
    lambda x_q, *rest: x_q.new_empty((x_q.shape[1], round_up(x_q.shape[0], 16))),
    "norm_triton:norm_transposed",
)


def norm_transposed(
    x_q: torch.Tensor,
    x_s: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    *,
    offset: float = 0.0,
    group_size: int,
) -> torch.Tensor:
    """The output of :func:`norm` made again from its kept input, as transposed codes ``y.T / scale``.

    It is the operand of the next linear layer's weight gradient. It is computed in float32 and rounded once, to FP8;
    what exceeds the range of ``scale`` is held at the largest code.

    Args:
        x_q: E4M3 codes of the input [T, H].
        x_s: Their groups' scales [T, ceil(H / G)], E8M0 (uint8), BF16 or FP32.
        mean: float32 [T] of a LayerNorm, None of an RMSNorm.
        rstd: float32 [T].
        weight: BF16 or FP32 [H], or None.
        bias: BF16 or FP32 [H], or None.
        scale: float32 [1, 1]; the largest of the forward's ``y_s`` fits.
        offset: As in the forward.
        group_size: G.

    Returns:
        E4M3 codes [H, round_up(T, 16)], zeros beyond T.

    Raises:
        TypeError, ValueError: For dtypes or shapes that do not fit; the message names the value.
    """
    _check_kept("norm_transposed", x_q, x_s, mean, rstd, group_size)
    _check_values("norm_transposed", weight=weight, bias=bias)
    _check_vectors("norm_transposed", x_q.shape[1], offset, weight, bias)
    if scale.dtype != torch.float32 or tuple(scale.shape) != (1, 1):
        raise ValueError(f"norm_transposed: scale is {scale.dtype} {list(scale.shape)}, expected torch.float32 [1, 1]")
    return _norm_transposed(x_q, x_s, mean, rstd, weight, bias, scale, float(offset), group_size)


def norm_values_ref(x_q, x_s, mean, rstd, weight, bias, offset, group_size, dtype):
    return _affine(_kept_xhat(x_q, x_s, mean, rstd, group_size), weight, bias, offset).to(dtype)


_norm_values = register(
    "norm_values(Tensor x_q, Tensor x_s, Tensor? mean, Tensor rstd, Tensor? weight, Tensor? bias, float offset, "
    "int group_size, ScalarType dtype) -> Tensor",
    norm_values_ref,
    lambda x_q, x_s, mean, rstd, weight, bias, offset, group_size, dtype: x_q.new_empty(x_q.shape, dtype=dtype),
    "norm_triton:norm_values",
)


def norm_values(
    x_q: torch.Tensor,
    x_s: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    offset: float = 0.0,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The output of :func:`norm` made again from its kept input, as values: computed in float32 and rounded once.

    Args:
        x_q, x_s, mean, rstd, weight, bias, offset, group_size: As of :func:`norm_transposed`.
        dtype: ``torch.bfloat16`` or ``torch.float32``.

    Returns:
        y [T, H] in ``dtype``.

    Raises:
        TypeError, ValueError: For dtypes or shapes that do not fit; the message names the value.
    """
    _check_kept("norm_values", x_q, x_s, mean, rstd, group_size)
    _check_values("norm_values", weight=weight, bias=bias)
    _check_vectors("norm_values", x_q.shape[1], offset, weight, bias)
    _check_dtype("norm_values", "dtype", dtype)
    return _norm_values(x_q, x_s, mean, rstd, weight, bias, float(offset), group_size, dtype)
