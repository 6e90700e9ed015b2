"""The FP8 linear layer as one differentiable function: what is quantized, what is kept, what is multiplied.

    forward           x_q = Q(x)    w_q = Q(w)              y  = x_q @ w_q.T + b
    kept              x_q (one byte a value) and its scales, or nothing where a Source gives x back; never x
    input gradient    dy_q = Q(dy)  w_qt = Q(w).T           dx = dy_q @ w_qt.T
    weight gradient   dy_qt         x_qt                    dw = dy_qt @ x_qt.T

A product that adds up over tokens has one scale for all of them. With scales per token, codes therefore move to the
largest scale while they are transposed: exactly, for the scales are powers of two (see coat_kernels.transpose). With
one scale per tensor (the COAT paper, arXiv 2410.19313 section 4) the input's transposed codes are what is kept.

Linears that read the same input (q, k and v) run as one: one product forward (unless each is large enough alone, or
the codes of their weights lie apart in memory already), one for the input gradient, whose codes share a scale per
token, and one for the gradients of all weights.
"""

from collections.abc import Sequence

import torch
from coat_kernels import Fp8Format, Granularity, quantize, scaled_mm, transpose

from .buckets import runs, take_places
from .operands import (
    QuantizedInput,
    Weight,
    WeightCache,
    bits_and_scales,
    forward_products,
    input_gradient,
    quantize_input,
    results,
)

_INPUTS = 3  # tensors of a layer's function before its weights: the input, its codes and their scales


def weight_gradients(dy_q, dy_s, dy_qt, x_s, kept, rebuild, weights, ctx, first=0) -> Sequence[torch.Tensor]:
    """``dw [N_i, K] = dy_i.T @ x`` in FP8 for each of the weights: as one product, or in DDP's buckets.

    Args:
        dy_q: Codes of the output's gradient [T, N], with ``dy_s``, float32 [T, 1] or [1, 1].
        dy_qt: The same transposed, [N, round_up(T, 16)], where there is one scale per tensor.
        x_s: Scales of the input's codes, float32 [T, 1] or [1, 1].
        kept: What was kept of the input, see ``QuantizedInput.kept``.
        rebuild: ``Source.rebuild`` of the input, or None.
        weights: [N_i, K], BF16 or FP32, which the gradients are too; N is the sum of all N_i.
        ctx: The function whose backward runs.
        first: How many of its weights come before these.
    """
    if dy_qt is not None:  # one scale per tensor
        operands = dy_qt, kept[0] if rebuild is None else rebuild(x_s, *kept), dy_s, x_s
    elif rebuild is not None:
        top = x_s.amax(dim=(0, 1), keepdim=True)
        dy_qt, dy_top = transpose(dy_q, dy_s)
        operands = dy_qt, rebuild(top, *kept), dy_top, top
    else:  # The products of a token share both its scales, so one operand, the narrower one, is moved to carry both.
        x_q, both = kept[0], x_s * dy_s
        x_moves = x_q.shape[1] <= dy_q.shape[1]
        x_qt, x_top = transpose(x_q, both if x_moves else None)
        dy_qt, dy_top = transpose(dy_q, None if x_moves else both)
        operands = dy_qt, x_qt, x_top if x_moves else dy_top, both.new_ones(1, 1)
    dy_qt, *others = operands
    places, out_dtype = take_places(ctx, _INPUTS + first, len(weights)), weights[0].dtype
    if places is None:
        dw = scaled_mm(dy_qt, *others, out_dtype=out_dtype)
        return dw.split([len(w) for w in weights]) if len(weights) > 1 else (dw,)
    together = runs(places)
    for rows, out in zip(dy_qt.split([len(out) for out in together]), together, strict=True):
        scaled_mm(rows, *others, out_dtype=out_dtype, out=out)
    return places


_SETTINGS = 12  # arguments of _CoatLinear before its weights


class _CoatLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, codes, scale, keep, rebuild, cache, stored, granularity, power_of_two, grad_dtype, out_dtype, many,
        *tensors,
    ):  # fmt: skip
        """``tensors`` are ``many`` weights, as many biases (or None), then what is kept of the input if not codes;
        ``stored`` are the scales of weights that are codes, else None."""
        weights, biases, kept = tensors[:many], tensors[many : 2 * many], tensors[2 * many :] or (codes,)
        ys, w_s = forward_products(codes, scale, weights, biases, granularity, power_of_two, cache, stored, out_dtype)
        ctx.save_for_backward(w_s, scale, *weights, *(kept if keep else ()))
        ctx.x_shape, ctx.x_dtype, ctx.many = x.shape, x.dtype, many
        ctx.bias_dtype = None if biases[0] is None else biases[0].dtype
        ctx.rebuild, ctx.cache, ctx.recipe = rebuild, cache, (granularity, power_of_two, grad_dtype)
        return results(ys, x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *dys):
        w_s, x_s, *rest = ctx.saved_tensors
        weights, kept = rest[: ctx.many], rest[ctx.many :]
        granularity, power_of_two, grad_dtype = ctx.recipe
        needs_dx, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[_SETTINGS:]
        needs_dw, needs_db = any(needs[: ctx.many]), any(needs[ctx.many : 2 * ctx.many])
        dx, dws, dbs = None, [None] * ctx.many, [None] * ctx.many
        dys = [dy.reshape(-1, dy.shape[-1]) for dy in dys]  # [T, N_i]
        if needs_dx or needs_dw:
            dy_q, dy_qt, dy_s = quantize(
                dys[0] if ctx.many == 1 else dys, grad_dtype, granularity, power_of_two=power_of_two,
                transposed=needs_dw and granularity == Granularity.TENSOR, **({} if ctx.many == 1 else {"dim": 1}),
            )  # fmt: skip
        if needs_dx:
            dx = input_gradient(dy_q, dy_s, weights, w_s, ctx.cache, dys[0].dtype).to(ctx.x_dtype).view(ctx.x_shape)
        if needs_dw:
            dws = weight_gradients(dy_q, dy_s, dy_qt, x_s, kept, ctx.rebuild, weights, ctx)
        if needs_db:
            dbs = [dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype) for dy in dys]
        return dx, *[None] * (_SETTINGS - 1), *dws, *dbs, *[None] * (len(needs) - 2 * ctx.many)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of a layer's results: autocast's where autocast is on, else that of ``x``.

    Raises:
        TypeError: For anything but BF16 and FP32.
    """
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    if dtype not in (torch.bfloat16, torch.float32):
        raise TypeError(
            f"COAT computes in torch.bfloat16 or torch.float32, but this linear was asked for {dtype}; load "
            "the model with dtype=torch.bfloat16 and train with bf16=True"
        )
    return dtype


def coat_linear(
    x: torch.Tensor,
    weight: Weight | Sequence[Weight],
    bias: torch.Tensor | Sequence[torch.Tensor] | None = None,
    *,
    granularity: Granularity = Granularity.TOKEN,
    power_of_two: bool = True,
    grad_format: Fp8Format = Fp8Format.E4M3,
    cache: WeightCache | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """``y = x @ weight.T + bias`` with all three products in FP8, and FP8 kept for the backward.

    Args:
        x: BF16 or FP32 [..., K], any leading shape.
        weight: BF16 or FP32 [N, K]; any N and K. Where it is frozen, nothing of ``x`` is kept. Or several such
            weights of one dtype, all frozen or none, with scales per token; the result is then a tuple. A
            :class:`~hf_coat.functional.operands.StoredWeight`, whose codes are at hand, is multiplied as it is.
        bias: BF16 or FP32 [N], or None; as many as there are weights, or none at all.
        granularity: One scale per token (and per output feature of the weight), or one per tensor.
        power_of_two: Scales that are powers of two; required with a scale per token.
        grad_format: Format of the output gradient's codes. Inputs and weights are always E4M3.
        cache: Where the weights' codes are kept over microbatches; not used where no gradients are recorded.

    Returns:
        [..., N], in autocast's dtype where autocast is on, else in the dtype of ``x``.
    """
    out_dtype = compute_dtype(x)
    weights, stored = bits_and_scales((weight,) if isinstance(weight, Weight) else tuple(weight))
    biases = (bias,) * len(weights) if bias is None else (bias,) if isinstance(bias, torch.Tensor) else tuple(bias)
    keep = torch.is_grad_enabled() and weights[0].requires_grad
    quantized: QuantizedInput = quantize_input(x, granularity, power_of_two, keep)
    rebuild = None if quantized.source is None else quantized.source.rebuild
    cache = cache if torch.is_grad_enabled() else None
    return _CoatLinear.apply(
        x, quantized.codes, quantized.scale, keep, rebuild, cache, stored, granularity.value, power_of_two,
        grad_format.dtype, out_dtype, len(weights), *weights, *biases, *quantized.kept,
    )  # fmt: skip
