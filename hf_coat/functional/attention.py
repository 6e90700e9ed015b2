"""Attention that keeps q, k and v as FP8 groups, whatever kernel computes it; and the rotary embedding before it.

    forward     out = attention(q, k, v)
    kept        q, k and v as FP8 groups; neither the output nor anything of the kernel's own
    backward    the attention once more, of the kept q, k and v, and its gradients

The attention is computed again because its backward needs probabilities that add up to one. With the log-sum-exp of
the exact scores and scores from rounded q and k they do not: the larger the scores, the less; a model that is trained
so diverges when its attention becomes sharp. Computed again, the gradients are those of the attention at a point one
FP8 rounding away.
"""

from collections.abc import Callable

import torch
from coat_kernels import Granularity, ScaleFormat, dequantize, quantize, rotary

from .operands import E4M3, Source, Watcher


def _rows(t: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """``t`` [B, N, S, D] as a matrix in the order of its memory, and whether that is [B, S, N, D]."""
    if t.stride(1) < t.stride(2):
        return t.transpose(1, 2).flatten(2).flatten(0, 1), True
    return t.flatten(0, 2), False


def _values(rows: torch.Tensor, shape: torch.Size, swapped: bool) -> torch.Tensor:
    batch, heads, length, dim = shape
    return rows.view(batch, length, heads, dim).transpose(1, 2) if swapped else rows.view(shape)


class _CoatAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, attend, group_size, scale_dtype):
        kept, ctx.layouts = [], []
        for t in (query, key, value):
            rows, swapped = _rows(t)
            codes, _, scale = quantize(
                rows, E4M3, Granularity.GROUP, group_size=group_size, power_of_two=scale_dtype == torch.uint8,
                scale_dtype=scale_dtype,
            )  # fmt: skip
            kept += [codes, scale]
            if Watcher.see is not None:
                Watcher.see("attention", rows, codes, scale, group_size)
            ctx.layouts.append((t.shape, t.dtype, swapped))
        ctx.save_for_backward(*kept)
        kind = query.device.type
        ctx.attend, ctx.group_size = attend, group_size
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        return attend(query, key, value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        kept, inputs = ctx.saved_tensors, []
        for i, (shape, dtype, swapped) in enumerate(ctx.layouts):
            rows = dequantize(kept[2 * i], kept[2 * i + 1], group_size=ctx.group_size, dtype=dtype)
            inputs.append(_values(rows, shape, swapped).requires_grad_(ctx.needs_input_grad[i]))
        kind, dtype, enabled = ctx.autocast
        with torch.enable_grad(), torch.autocast(kind, dtype=dtype, enabled=enabled):
            out = ctx.attend(*inputs)
        wanted = iter(torch.autograd.grad(out, [t for t in inputs if t.requires_grad], dout))
        return *[next(wanted) if t.requires_grad else None for t in inputs], None, None, None


def _copied(t: torch.Tensor) -> torch.Tensor:
    return t.clone(memory_format=torch.contiguous_format)


class _Compact(torch.autograd.Function):
    """A copy of x [B, N, S, D] that stands by itself, in the memory order [B, S, N, D]."""

    @staticmethod
    def forward(ctx, x):
        rows, values = x.transpose(1, 2), 8 // x.element_size()
        aligned = not any(n % values for n in (x.shape[-1], x.storage_offset(), *rows.stride()[:-1]))
        if aligned and rows.stride(-1) == 1:  # torch copies strided rows one element at a time: 8 bytes are quicker
            return _copied(rows.view(torch.int64)).view(x.dtype).transpose(1, 2)
        return _copied(rows).transpose(1, 2)

    @staticmethod
    def backward(ctx, dy):
        return dy


def _from_values(scale, x):
    return quantize(x, E4M3, Granularity.TENSOR, scale=scale, codes=False, transposed=True)[1]


def _the_values(dtype, x):
    return x.to(dtype)


def keep_attention(
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    fp8: bool = True,
    group_size: int = 128,
    scale_format: ScaleFormat = ScaleFormat.E8M0,
) -> torch.Tensor:
    """Run an attention and decide what is kept for its backward.

    Args:
        attend: Computes the output [B, S, N, D] from q, k and v; the same each time it is called.
        query, key, value: [B, N, S, D].
        fp8: Keep q, k and v as FP8 groups and compute the attention again; False keeps what the kernel keeps, and
            lets the linear behind it use the output that the kernel holds.
        group_size: Consecutive values of a token that share a scale.
        scale_format: How those scales are kept.
    """
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    if not recorded or torch.compiler.is_compiling() or query.dim() != 4:
        return attend(query, key, value)
    if fp8:
        return _CoatAttention.apply(query, key, value, attend, group_size, scale_format.dtype)
    if value.untyped_storage().nbytes() > 2 * value.nbytes:  # a part of q, k and v as one: it would keep them all
        value = _Compact.apply(value)
    out = attend(query, key, value)
    if out._base is not None and out.is_contiguous():  # another view of what the kernel has saved
        kept = (out.detach().flatten(2).flatten(0, 1),)
        Source(_from_values, _the_values, kept).note_on(out, out.shape[2:].numel())
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotary(q, k, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq, dk):
        return *rotary(dq, dk, *ctx.saved_tensors, inverse=True), None, None


def coat_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x * cos + rotate_half(x) * sin`` of q and k in one pass, computed in float32 and rounded once.

    Args:
        q, k: BF16 or FP32 [B, N, S, D], of any strides.
        cos, sin: [B or 1, S, D].
    """
    return _Rotary.apply(q, k, cos, sin)
