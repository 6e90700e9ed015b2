"""The FP8 linear layer as one differentiable function: what is quantized, what is kept, what is multiplied.

    forward           x_q = Q(x)    w_q = Q(w)              y  = x_q @ w_q.T + b
    kept              x_q (one byte a value) and its scales; never x
    input gradient    dy_q = Q(dy)  w_qt = Q(w).T           dx = dy_q @ w_qt.T
    weight gradient   dy_qt         x_qt = (kept codes).T   dw = dy_qt @ x_qt.T

A product that adds up over tokens has one scale for all of them. With scales per token, the codes of one operand
therefore move to the largest product of both scales while they are transposed: exactly, for the scales are powers of
two (see coat_kernels.transpose). With one scale per tensor (the COAT paper, arXiv 2410.19313 section 4) the input's
transposed codes are what is kept.

The weight is quantized again in the backward, straight into its transposed layout: keeping codes of all weights from
the forward to the backward would cost a byte per parameter.
"""

from typing import NamedTuple

import torch
from coat_kernels import Fp8Format, Granularity, quantize, scaled_mm, transpose

E4M3 = Fp8Format.E4M3.dtype


class QuantizedInput(NamedTuple):
    """FP8 twin of a linear's input: codes [T, K], transposed codes [K, round_up(T, 16)] if kept so, float32 scales."""

    codes: torch.Tensor
    transposed: torch.Tensor | None
    scale: torch.Tensor


def quantize_input(x: torch.Tensor, granularity: Granularity, power_of_two: bool, keep: bool) -> QuantizedInput:
    """Quantize a linear's input ``x`` [..., K]; linears that read the same tensor share one result.

    The result stays with the tensor object for as long as that lives unchanged: q, k and v (or gate and up) then keep
    one FP8 copy between them, as they keep one BF16 copy without COAT.
    """
    # A compiler merges equal calls by itself. Under a frozen weight somebody else may keep x, and our codes with it,
    # in vain.
    shareable = not (torch.compiler.is_compiling() or x.is_inference()) and (keep or not torch.is_grad_enabled())
    key = (granularity, power_of_two, x._version, keep) if shareable else None
    if shareable and getattr(x, "_coat_quantized", (None,))[0] == key:
        return x._coat_quantized[1]
    with torch.no_grad():
        transposed = keep and granularity == Granularity.TENSOR
        quantized = QuantizedInput(*quantize(x, E4M3, granularity, power_of_two=power_of_two, transposed=transposed))
    if shareable:
        x._coat_quantized = (key, quantized)
    return quantized


class _CoatLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, x_q, x_qt, x_s, keep, granularity, power_of_two, grad_dtype, out_dtype):
        w_q, _, w_s = quantize(weight, E4M3, granularity, power_of_two=power_of_two)
        y = scaled_mm(x_q, w_q, x_s, w_s, bias, out_dtype=out_dtype, fast_accum=True)
        kept = (x_qt if granularity == Granularity.TENSOR else x_q) if keep else None
        ctx.save_for_backward(weight, w_s, kept, x_s)
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.recipe = granularity, power_of_two, grad_dtype
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        weight, w_s, kept, x_s = ctx.saved_tensors
        granularity, power_of_two, grad_dtype = ctx.recipe
        per_tensor = granularity == Granularity.TENSOR
        needs_dx, needs_dw, needs_db = ctx.needs_input_grad[:3]
        dx = dw = db = None
        dy = dy.reshape(-1, dy.shape[-1])  # [T, N]
        if needs_dx or needs_dw:
            dy_q, dy_qt, dy_s = quantize(
                dy, grad_dtype, granularity, power_of_two=power_of_two, transposed=needs_dw and per_tensor
            )
        if needs_dx:
            top = w_s.amax(dim=(0, 1), keepdim=True)
            _, w_qt, _ = quantize(weight, E4M3, Granularity.TENSOR, scale=top, codes=False, transposed=True)  # [K, N]
            dx = scaled_mm(dy_q, w_qt, dy_s, top, out_dtype=dy.dtype).to(ctx.x_dtype).view(ctx.x_shape)
        if needs_dw and per_tensor:
            dw = scaled_mm(dy_qt, kept, dy_s, x_s, out_dtype=weight.dtype)
        elif needs_dw:
            # The products of a token share both its scales, so one operand, the narrower one, is moved to carry both.
            both = x_s * dy_s
            x_moves = kept.shape[1] <= dy_q.shape[1]
            x_qt, x_top = transpose(kept, both if x_moves else None)
            dy_qt, dy_top = transpose(dy_q, None if x_moves else both)
            dw = scaled_mm(dy_qt, x_qt, x_top if x_moves else dy_top, both.new_ones(1, 1), out_dtype=weight.dtype)
        if needs_db:
            db = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return dx, dw, db, *[None] * 8


def coat_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    granularity: Granularity = Granularity.TOKEN,
    power_of_two: bool = True,
    grad_format: Fp8Format = Fp8Format.E4M3,
) -> torch.Tensor:
    """``y = x @ weight.T + bias`` with all three products in FP8, and FP8 kept for the backward.

    Args:
        x: BF16 or FP32 [..., K], any leading shape.
        weight: BF16 or FP32 [N, K]; any N and K. Where it is frozen, nothing of ``x`` is kept.
        bias: BF16 or FP32 [N], or None.
        granularity: One scale per token (and per output feature of the weight), or one per tensor.
        power_of_two: Scales that are powers of two; required with a scale per token.
        grad_format: Format of the output gradient's codes. Inputs and weights are always E4M3.

    Returns:
        [..., N], in autocast's dtype where autocast is on, else in the dtype of ``x``.
    """
    out_dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    if out_dtype not in (torch.bfloat16, torch.float32):
        raise TypeError(
            f"COAT computes in torch.bfloat16 or torch.float32, but this linear was asked for {out_dtype}; load "
            "the model with dtype=torch.bfloat16 and train with bf16=True"
        )
    keep = torch.is_grad_enabled() and weight.requires_grad
    quantized = quantize_input(x, granularity, power_of_two, keep)
    return _CoatLinear.apply(
        x, weight, bias, *quantized, keep, granularity.value, power_of_two, grad_format.dtype, out_dtype
    )  # fmt: skip
