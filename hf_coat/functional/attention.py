"""What an attention keeps for its backward, as FP8 groups; and the rotary position embedding in front of it.

q, k, v and the output are kept by whatever kernel computes the attention, through autograd. COAT stands in between
with a hook on saved tensors, so it serves every kernel and changes none. The output projection reads the output that
is kept here already, and keeps nothing of its own.
"""

import functools
from collections.abc import Callable

import torch
from coat_kernels import Granularity, ScaleFormat, activation_transposed, dequantize, quantize, rotary

from .operands import E4M3, Source

_outer_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def _rows(t: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """``t`` [B, N, S, D] as a matrix in the order of its memory, and whether that is [B, S, N, D]."""
    if t.stride(1) < t.stride(2):
        return t.transpose(1, 2).flatten(2).flatten(0, 1), True
    return t.flatten(0, 2), False


def _place(t: torch.Tensor) -> tuple[int, int]:
    return t.untyped_storage()._cdata, t.storage_offset()


class _Residuals:
    """The saved-tensor hooks of one call: packs what has the dtype and width of q, k or v into FP8 groups.

    What it makes goes on to the hooks outside of it, so gradient checkpointing and offloading see FP8 groups.
    """

    def __init__(self, like: tuple[torch.Tensor, ...], group_size: int, scale_format: ScaleFormat, keep_fp8: bool):
        self.widths, self.dtype = {t.shape[-1] for t in like}, like[0].dtype
        # With as many keys as a head has values, masks and probabilities look like an output.
        self.certain = {_place(t) for t in like} if like[1].shape[2] in self.widths else None
        self.group_size, self.scale_dtype, self.keep_fp8 = group_size, scale_format.dtype, keep_fp8
        self.outer = _outer_hooks(False)
        self.seen: dict[tuple, tuple] = {}  # where a kept tensor lies -> it, and what is kept of it

    def pack(self, t: torch.Tensor):
        outer_pack = self.outer[0] if self.outer else lambda x: x
        if t.dim() != 4 or t.dtype != self.dtype or t.shape[-1] not in self.widths or t.numel() == 0:
            return outer_pack(t)
        if self.certain is not None and _place(t) not in self.certain:
            return outer_pack(t)
        if not self.keep_fp8:
            if t.untyped_storage().nbytes() > 2 * t.nbytes:  # a part of q, k and v as one: it would keep them all
                t = t.transpose(1, 2).contiguous().transpose(1, 2)
            self.seen[_place(t)] = t, (t,)
            return outer_pack(t)
        rows, swapped = _rows(t.detach())
        codes, _, scale = quantize(
            rows, E4M3, Granularity.GROUP, group_size=self.group_size, power_of_two=self.scale_dtype == torch.uint8,
            scale_dtype=self.scale_dtype,
        )  # fmt: skip
        self.seen[_place(t)] = t, (codes, scale)
        return _Packed(outer_pack(codes), outer_pack(scale), t.shape, t.dtype, swapped, self.group_size)

    def unpack(self, packed):
        outer_unpack = self.outer[1] if self.outer else lambda x: x
        if not isinstance(packed, _Packed):
            return outer_unpack(packed)
        return packed.values(outer_unpack)


class _Packed:
    def __init__(self, codes, scale, shape, dtype, swapped, group_size):
        self.codes, self.scale, self.shape, self.dtype = codes, scale, shape, dtype
        self.swapped, self.group_size = swapped, group_size

    def values(self, unpack: Callable) -> torch.Tensor:
        rows = dequantize(unpack(self.codes), unpack(self.scale), group_size=self.group_size, dtype=self.dtype)
        batch, heads, length, dim = self.shape
        return rows.view(batch, length, heads, dim).transpose(1, 2) if self.swapped else rows.view(self.shape)


def _from_groups(scale, codes, stored, *, group_size):
    return activation_transposed(codes, stored, scale, act="identity", gated=False, group_size=group_size)


def _from_values(scale, x):
    return quantize(x, E4M3, Granularity.TENSOR, scale=scale, codes=False, transposed=True)[1]


def keep_attention(
    attend: Callable[[], torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    fp8: bool = True,
    group_size: int = 128,
    scale_format: ScaleFormat = ScaleFormat.E8M0,
) -> torch.Tensor:
    """Run an attention and decide how what it saves is kept.

    Args:
        attend: Computes the output [B, S, N, D] from what it holds.
        query, key, value: [B, N, S, D], what the attention reads.
        fp8: Keep q, k, v and the output as FP8 groups; False leaves them as they are.
        group_size: Consecutive values of a token that share a scale.
        scale_format: How those scales are kept.

    Returns:
        The output, on which it is noted what the linear behind it can be given instead of a copy of its own.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or query.dim() != 4:
        return attend()
    hooks = _Residuals((query, key, value), group_size, scale_format, fp8)
    with torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack):
        out = attend()
    (_, kept), hooks.seen = hooks.seen.get(_place(out), (None, None)), {}
    if kept is not None and out.is_contiguous():
        tokens = out.detach().flatten(2).flatten(0, 1)  # [T, N D], what the linear reads
        if not fp8:
            Source(_from_values, (tokens,)).note_on(out)
        elif kept[0].shape == tokens.shape:
            Source(functools.partial(_from_groups, group_size=group_size), kept).note_on(out)
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
