"""A frozen FP8 linear and the LoRA adapters beside it as one differentiable function.

    forward             y = x_q @ w_q.T (FP8)    h = drop(x) @ a.T  [T, r]    y += scaling * h @ b.T
    kept                x_q (or nothing, where a Source gives x back), h, and a and b in the result's dtype; never x
    input gradient      dx = dy_q @ w_qt.T (FP8)    u = scaling * dy @ b  [T, r]    dx += drop(u @ a)
    adapter gradients   db = scaling * dy.T @ h     da = u.T @ drop(x), with x as it is made again

The products of rank r are done in the dtype of the result, BF16 in training: they are bound by reading x and y, not by
arithmetic. They add into what the FP8 product wrote. Linears that read the same input run as one, with one product
for all their a, and x is made again once: from its codes, or by its Source in whatever way is closest to x. Where a
and b are cast or put together the backward has the copies, and does not see a later change of them.

Of dropout nothing is kept but the seed that it was drawn with.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from coat_kernels import Fp8Format, Granularity, dequantize, quantize

from .linear import compute_dtype
from .operands import (
    Weight,
    WeightCache,
    bits_and_scales,
    forward_products,
    input_gradient,
    quantize_input,
    results,
)

POWER_OF_TWO = True  # scales per token must be


class Adapter(NamedTuple):
    """A LoRA adapter: ``y += scaling * drop(x) @ a.T @ b.T``.

    Args:
        a: [r, K].
        b: [N, r].
        scaling: Factor of what the adapter adds.
        dropout: Probability of a value of x to be left out, 0 in evaluation.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    dropout: float = 0.0


class _Drop:
    """Dropout of tensors [T, K] by a mask that is drawn again from its seed each time."""

    def __init__(self, p: float):
        self.p, self.seed = p, int(torch.randint(2**62, ()))  # of torch's CPU generator: nothing waits for a GPU

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator(x.device).manual_seed(self.seed)
        mask = torch.empty(x.shape, dtype=x.dtype, device=x.device)  # not as x is strided, which differs
        return mask.bernoulli_(1 - self.p, generator=generator).mul_(x).div_(1 - self.p)


class _CoatLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, codes, scale, keep, values, cache, stored, grad_dtype, out_dtype, drops, scalings, *tensors):
        """``tensors`` are weights, biases (or None), a and b of the adapters (or None), each one for each linear, then
        what is kept of the input if not codes."""
        many = len(scalings)
        weights, biases, downs, ups = (tensors[i * many : (i + 1) * many] for i in range(4))
        kept = tensors[4 * many :] or (codes,)
        ys, w_s = forward_products(
            codes, scale, weights, biases, Granularity.TOKEN, POWER_OF_TWO, cache, stored, out_dtype
        )
        flat = x.reshape(-1, x.shape[-1]).to(out_dtype)
        ranks = [0 if a is None else a.shape[0] for a in downs]
        there = [a for a in downs if a is not None]
        joined_a = (there[0] if len(there) == 1 else torch.cat(there)).to(out_dtype)  # [sum r, K]
        bs = [None if b is None else b.to(out_dtype) for b in ups]
        if any(drops):
            parts = joined_a.split(ranks)
            h = torch.cat([_dropped(flat, drop) @ a.t() for a, drop in zip(parts, drops, strict=True)], dim=1)
        else:
            h = flat @ joined_a.t()  # [T, sum r]
        for part, y_i, b, scaling in zip(h.split(ranks, dim=1), ys, bs, scalings, strict=True):
            if b is not None:
                y_i.addmm_(part, b.t(), alpha=scaling)
        ctx.save_for_backward(w_s, scale, h, joined_a, *bs, *weights, *(kept if keep else ()))
        ctx.x_shape, ctx.x_dtype, ctx.ranks, ctx.values, ctx.cache = x.shape, x.dtype, ranks, values, cache
        ctx.drops, ctx.scalings, ctx.grad_dtype = drops, scalings, grad_dtype
        ctx.bias_dtype = None if biases[0] is None else biases[0].dtype
        ctx.adapter_dtypes = [None if t is None else t.dtype for t in (*downs, *ups)]
        return results(ys, x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *dys):
        w_s, x_s, h, joined_a, *rest = ctx.saved_tensors
        many, scalings, drops = len(ctx.scalings), ctx.scalings, ctx.drops
        bs, weights, kept = rest[:many], rest[many : 2 * many], rest[2 * many :]
        needs_dx, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[_SETTINGS:]
        needs_bias, needs_a, needs_b = (needs[i * many : (i + 1) * many] for i in (1, 2, 3))
        dys = [dy.reshape(-1, dy.shape[-1]) for dy in dys]  # [T, N_i]
        dtype = dys[0].dtype
        dx, das, dbs = None, [None] * many, [None] * many
        joined = h.new_empty(h.shape, dtype=dtype)  # all u, [T, sum r]
        us = joined.split(ctx.ranks, dim=1)
        for dy, b, u, scaling in zip(dys, bs, us, scalings, strict=True):
            if b is not None:
                u.addmm_(dy, b, beta=0, alpha=scaling)
        for i, part in enumerate(h.split(ctx.ranks, dim=1)):
            if needs_b[i]:
                dbs[i] = part.new_empty(bs[i].shape).addmm_(dys[i].t(), part, beta=0, alpha=scalings[i])
        biases = [
            dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if wanted else None
            for dy, wanted in zip(dys, needs_bias, strict=True)
        ]
        if needs_dx:
            dy_q, _, dy_s = quantize(
                dys[0] if many == 1 else dys, ctx.grad_dtype, Granularity.TOKEN, **({} if many == 1 else {"dim": 1})
            )
            dx = input_gradient(dy_q, dy_s, weights, w_s, ctx.cache, dtype)
            del dy_q
        del dys
        if needs_dx and not any(drops):
            dx.addmm_(joined, joined_a)
        elif needs_dx:
            for u, a, drop in zip(us, joined_a.split(ctx.ranks), drops, strict=True):
                if len(a):
                    dx.add_(_dropped(u @ a, drop))
        if any(needs_a):
            x = dequantize(kept[0], x_s, dtype=dtype) if ctx.values is None else ctx.values(dtype, *kept)
            if any(drops):
                das = [u.t() @ _dropped(x, drop) for u, drop in zip(us, drops, strict=True)]
            else:
                das = [joined.t() @ x]  # [sum r, K]
            das = das if any(drops) else das[0].split(ctx.ranks)
            das = [da if needed else None for da, needed in zip(das, needs_a, strict=True)]
        grads = [None if g is None else g.to(as_is) for g, as_is in zip((*das, *dbs), ctx.adapter_dtypes, strict=True)]
        dx = None if dx is None else dx.to(ctx.x_dtype).view(ctx.x_shape)
        return dx, *[None] * (_SETTINGS - 1), *[None] * many, *biases, *grads, *[None] * (len(needs) - 4 * many)


_SETTINGS = 11  # arguments of _CoatLora before its tensors


def _dropped(x: torch.Tensor, drop: _Drop | None) -> torch.Tensor:
    return x if drop is None else drop(x)


def coat_lora(
    x: torch.Tensor,
    weight: Weight | Sequence[Weight],
    bias: torch.Tensor | Sequence[torch.Tensor] | None,
    adapter: Adapter | Sequence[Adapter | None],
    *,
    grad_format: Fp8Format = Fp8Format.E4M3,
    cache: WeightCache | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """``y = x @ weight.T + bias + scaling * drop(x) @ a.T @ b.T``, the frozen weight in FP8 with a scale per row.

    The adapter's forward reads x as it is; its gradients are those of x as the backward has it: rounded to FP8, which
    is what is kept, or, where another layer keeps what x is made from, made from that (an attention keeps x itself).

    Args:
        x: BF16 or FP32 [..., K].
        weight: BF16, FP32 or stored as FP8, [N, K], frozen. Or several that read ``x``; the result is then a tuple.
        bias: [N] or None; as many as there are weights, or none at all.
        adapter: As many as there are weights, at least one of them not None.
        grad_format: Format of the codes of the output's gradient.
        cache: Where the codes of weights that are not stored are kept over microbatches.

    Returns:
        [..., N], in autocast's dtype where autocast is on, else in the dtype of ``x``.
    """
    out_dtype = compute_dtype(x)
    weights, stored = bits_and_scales((weight,) if isinstance(weight, Weight) else tuple(weight))
    adapters = (adapter,) if isinstance(adapter, Adapter) else tuple(adapter)
    many = len(weights)
    biases = (bias,) * many if bias is None else (bias,) if isinstance(bias, torch.Tensor) else tuple(bias)
    keep = torch.is_grad_enabled() and any(a is not None and a.a.requires_grad for a in adapters)
    quantized = quantize_input(x, Granularity.TOKEN, POWER_OF_TWO, keep)
    values = None if quantized.source is None else quantized.source.values
    drops = tuple(_Drop(a.dropout) if a is not None and a.dropout else None for a in adapters)
    return _CoatLora.apply(
        x, quantized.codes, quantized.scale, keep, values, cache if torch.is_grad_enabled() else None, stored,
        grad_format.dtype, out_dtype, drops, tuple(0.0 if a is None else a.scaling for a in adapters), *weights,
        *biases, *(None if a is None else a.a for a in adapters), *(None if a is None else a.b for a in adapters),
        *quantized.kept,
    )  # fmt: skip
