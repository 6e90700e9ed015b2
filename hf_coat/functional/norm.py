"""RMSNorm and LayerNorm that keep their input as FP8 groups.

    forward     y = xhat * (w + offset) + b    from x as it is
    kept        x as FP8 groups, 1 / its root mean square (and its mean) per token; never x or y
    backward    xhat from the kept groups

The linears that read ``y`` keep nothing: for their weight gradients the codes of ``y`` are made again from the same
groups; for the adapters of LoRA, its values. (COAT keeps the norm's input and its output, arXiv 2410.19313 section 4.)
"""

import functools

import torch
from coat_kernels import ScaleFormat, norm, norm_backward, norm_transposed, norm_values

from .operands import Demand, Source, Watcher


def _codes_again(scale, *kept, offset, group_size):
    return norm_transposed(*kept, scale, offset=offset, group_size=group_size)


def _values_again(dtype, *kept, offset, group_size):
    return norm_values(*kept, offset=offset, group_size=group_size, dtype=dtype)


class _CoatNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, settings, group_size, scale_dtype, demand, sources):
        made = norm(
            x,
            weight,
            bias,
            **settings,
            group_size=group_size,
            scale_dtype=scale_dtype,
            codes=demand is not None and demand.codes,
        )
        kept = made.x_q, made.x_s, made.mean, made.rstd
        if Watcher.see is not None:
            Watcher.see("norm", x, made.x_q, made.x_s, group_size)
        ctx.save_for_backward(*kept, weight)
        ctx.x_shape, ctx.x_dtype, ctx.bias_dtype = x.shape, x.dtype, None if bias is None else bias.dtype
        ctx.offset, ctx.group_size = settings["offset"], group_size
        if sources is not None:
            again = (
                functools.partial(f, offset=ctx.offset, group_size=group_size) for f in (_codes_again, _values_again)
            )
            sources.append(Source(*again, (*kept, weight, bias), made.y_q, made.y_s, demand))
        return torch.ops.aten._unsafe_view(made.y, x.shape)  # which may be changed in place

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        *kept, weight = ctx.saved_tensors
        needs_dx, needs_dw, needs_db = ctx.needs_input_grad[:3]
        dx, dw, db = norm_backward(
            dy.reshape(-1, dy.shape[-1]), *kept, weight, offset=ctx.offset, group_size=ctx.group_size,
            dx_dtype=ctx.x_dtype, bias=needs_db, dw=needs_dw,
        )  # fmt: skip
        return (
            dx.view(ctx.x_shape) if needs_dx else None,
            dw.to(weight.dtype) if needs_dw else None,
            db.to(ctx.bias_dtype) if needs_db else None,
            *[None] * 5,
        )


def coat_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
    center: bool = False,
    offset: float = 0.0,
    round_first: bool = True,
    out_dtype: torch.dtype | None = None,
    group_size: int = 128,
    scale_format: ScaleFormat = ScaleFormat.E8M0,
    share: bool = True,
    demand: Demand | None = None,
) -> torch.Tensor:
    """Normalise each token of ``x`` and keep FP8 groups of it for the backward.

    Args:
        x: BF16 or FP32 [..., H].
        weight: [H] or None; ``offset`` is added to it (1 where a model stores weight - 1).
        bias: [H] or None.
        eps: Added to the mean square, or to the variance.
        center: Subtract the mean (LayerNorm).
        offset, round_first, out_dtype: The form of the norm, see :func:`coat_kernels.norm`.
        group_size: Consecutive values of a token that share a scale.
        scale_format: How those scales are kept.
        share: Whether linears that read the result make its codes again from what is kept here.
        demand: Says whether they want its codes at once.

    Returns:
        The normalised tokens, as ``x`` is shaped.
    """
    settings = {"eps": eps, "center": center, "offset": offset, "round_first": round_first, "out_dtype": out_dtype}
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))):
        return norm(x, weight, bias, **settings).y.view(x.shape)
    sources = [] if share and not torch.compiler.is_compiling() else None
    y = _CoatNorm.apply(
        x, weight, bias, settings, group_size, scale_format.dtype, None if sources is None else demand, sources
    )
    if sources:
        sources[0].note_on(y)
    return y
