"""``act(gate) * up`` and the whole MLP around it, keeping gate and up as FP8 groups.

    forward     gate, up = products with x     h = act(gate) * up     y = h @ down.T
    kept        gate and up as FP8 groups; never h, which comes back from them by element-wise arithmetic
    backward    dh -> the codes of dgate and dup, which the products of the backward read as they are

COAT keeps gate, up and h (arXiv 2410.19313 section 4 and its table 2).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from coat_kernels import (
    Fp8Format,
    Granularity,
    ScaleFormat,
    activation,
    activation_backward,
    activation_transposed,
    activation_values,
    quantize,
)

from .linear import compute_dtype, weight_gradients
from .operands import (
    Demand,
    Source,
    Watcher,
    Weight,
    WeightCache,
    bits_and_scales,
    forward_products,
    input_gradient,
    quantize_input,
    results,
    sampled,
)


class Gate(NamedTuple):
    """What stands between an MLP's products, and how its input is kept.

    Args:
        act: One of :data:`coat_kernels.activation.ACTIVATIONS`.
        gated: Whether ``act(x) * up`` or ``act(x)``.
        group_size: Consecutive values of a token that share a scale.
        scale_format: How those scales are kept.
    """

    act: str
    gated: bool
    group_size: int = 128
    scale_format: ScaleFormat = ScaleFormat.E8M0


def _codes_again(scale, kept_q, kept_s, *, act, gated, group_size):
    return activation_transposed(kept_q, kept_s, scale, act=act, gated=gated, group_size=group_size)


def _values_again(dtype, kept_q, kept_s, *, act, gated, group_size):
    return activation_values(kept_q, kept_s, act=act, gated=gated, group_size=group_size, dtype=dtype)


def _show(x, up, made, gate: Gate) -> None:
    """Let the watcher see what is kept of the gate and up [T, I], and the codes of h where there are no values."""
    parts = [x] if up is None else [x, up]
    groups = made.kept_s.shape[1] // len(parts)
    for i, part in enumerate(parts):
        codes = made.kept_q[:, i * x.shape[1] : (i + 1) * x.shape[1]]
        Watcher.see("mlp", part, codes, made.kept_s[:, i * groups : (i + 1) * groups], gate.group_size)
    if made.h is None:
        h = activation(*(None if t is None else sampled(t).contiguous() for t in (x, up)), act=gate.act).h
        Watcher.see("linear", h, sampled(made.h_q), sampled(made.h_s), 0)


class _CoatActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, up, act, group_size, scale_dtype, demand, sources):
        rows, up_rows = x.reshape(-1, x.shape[-1]), None if up is None else up.reshape(-1, up.shape[-1])
        made = activation(
            rows, up_rows, act=act, group_size=group_size, scale_dtype=scale_dtype,
            codes=demand is not None and demand.codes,
        )  # fmt: skip
        if Watcher.see is not None:
            _show(rows, up_rows, made, Gate(act, up is not None, group_size))
        ctx.save_for_backward(made.kept_q, made.kept_s)
        ctx.x_shape, ctx.how = x.shape, {"act": act, "gated": up is not None, "group_size": group_size}
        if sources is not None:
            again = (functools.partial(f, **ctx.how) for f in (_codes_again, _values_again))
            sources.append(Source(*again, (made.kept_q, made.kept_s), made.h_q, made.h_s, demand))
        return torch.ops.aten._unsafe_view(made.h, x.shape)  # which may be changed in place

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dh):
        d, _, _ = activation_backward(dh.reshape(-1, dh.shape[-1]), *ctx.saved_tensors, **ctx.how)
        width = dh.shape[-1]
        dx, dup = d[:, :width].view(ctx.x_shape), d[:, width:].view(ctx.x_shape) if ctx.how["gated"] else None
        return dx, dup, *[None] * 5


def coat_activation(
    x: torch.Tensor, up: torch.Tensor | None, gate: Gate, *, share: bool = True, demand: Demand | None = None
) -> torch.Tensor:
    """``act(x) * up`` (``act(x)`` where ``up`` is None) of [..., I], keeping both as FP8 groups.

    Args:
        x, up: BF16 or FP32, of one shape.
        gate: Which activation, and how its input is kept.
        share: Whether linears that read the result make its codes again from what is kept here.
        demand: Says whether they want its codes at once.
    """
    if not (torch.is_grad_enabled() and (x.requires_grad or up is not None and up.requires_grad)):
        rows = (None if t is None else t.reshape(-1, t.shape[-1]) for t in (x, up))
        return activation(*rows, act=gate.act).h.view(x.shape)
    sources = [] if share and not torch.compiler.is_compiling() else None
    h = _CoatActivation.apply(
        x, up, gate.act, gate.group_size, gate.scale_format.dtype, None if sources is None else demand, sources
    )
    if sources:
        sources[0].note_on(h)
    return h


_SETTINGS = 12  # arguments of _CoatMLP before its weights


class _CoatMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, codes, scale, keep, rebuild, caches, stored, gate, grad_dtype, out_dtype, training, many, *tensors
    ):
        """``tensors`` are ``many`` first weights and the last one, their biases (or None), then what is kept of x;
        ``stored`` are the scales of the first weights and of the last where they are codes, else None."""
        *firsts, down = tensors[: many + 1]
        *first_biases, down_bias = tensors[many + 1 : 2 * (many + 1)]
        kept = tensors[2 * (many + 1) :] or (codes,)
        how = Granularity.TOKEN, True
        parts, w_s = forward_products(codes, scale, firsts, first_biases, *how, caches[0], stored[0], out_dtype)
        if gate.gated and many == 1:
            parts = parts[0].chunk(2, dim=1)
        x_act, up = parts if gate.gated else (parts[0], None)  # [T, I]
        made = activation(
            x_act, up, act=gate.act, values=False, codes=True,
            group_size=gate.group_size if training else 0, scale_dtype=gate.scale_format.dtype,
        )  # fmt: skip
        if Watcher.see is not None and training:
            _show(x_act, up, made, gate)
        del parts, x_act, up
        ys, down_s = forward_products(made.h_q, made.h_s, (down,), (down_bias,), *how, caches[1], stored[1], out_dtype)
        ctx.save_for_backward(
            made.kept_q, made.kept_s, made.h_s, w_s, down_s, scale, *tensors[: many + 1], *(kept if keep else ())
        )
        ctx.x_shape, ctx.x_dtype, ctx.many, ctx.gate = x.shape, x.dtype, many, gate
        ctx.rebuild, ctx.caches, ctx.grad_dtype = rebuild, caches, grad_dtype
        ctx.bias_dtypes = [None if b is None else b.dtype for b in (*first_biases, down_bias)]
        return results(ys, x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        kept_q, kept_s, h_s, w_s, down_s, x_s, *rest = ctx.saved_tensors
        firsts, down, kept = rest[: ctx.many], rest[ctx.many], rest[ctx.many + 1 :]
        needs_dx, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[_SETTINGS:]
        needs_dw, needs_down = any(needs[: ctx.many]), needs[ctx.many]
        how = {"act": ctx.gate.act, "gated": ctx.gate.gated, "group_size": ctx.gate.group_size}
        dx, dws, ddown = None, [None] * ctx.many, None
        dy = dy.reshape(-1, dy.shape[-1])

        dy_q, _, dy_s = quantize(dy, ctx.grad_dtype, Granularity.TOKEN)
        dh = input_gradient(dy_q, dy_s, (down,), down_s, ctx.caches[1], dy.dtype)  # [T, I]
        if needs_down:
            again = functools.partial(_codes_again, **how)
            (ddown,) = weight_gradients(dy_q, dy_s, None, h_s, (kept_q, kept_s), again, (down,), ctx, ctx.many)
        needs_db = any(needs[ctx.many + 1 : 2 * ctx.many + 1])
        _, d_q, d_s = activation_backward(dh, kept_q, kept_s, **how, codes=True, code_dtype=ctx.grad_dtype)
        dbs = [None] * (ctx.many + 1)
        if needs_db:
            values, _, _ = activation_backward(dh, kept_q, kept_s, **how)
            sizes = [w.shape[0] for w in firsts]
            dbs[: ctx.many] = [part.sum(0, dtype=torch.float32) for part in values.split(sizes, dim=1)]
            del values
        if needs[2 * ctx.many + 1]:
            dbs[-1] = dy.sum(0, dtype=torch.float32)
        del dh, dy, dy_q
        if needs_dx:
            dx = input_gradient(d_q, d_s, firsts, w_s, ctx.caches[0], ctx.x_dtype).view(ctx.x_shape)
        if needs_dw:
            dws = weight_gradients(d_q, d_s, None, x_s, kept, ctx.rebuild, firsts, ctx)
        dbs = [db if db is None else db.to(dtype) for db, dtype in zip(dbs, ctx.bias_dtypes, strict=True)]
        return dx, *[None] * (_SETTINGS - 1), *dws, ddown, *dbs, *[None] * (len(needs) - 2 * (ctx.many + 1))


def coat_mlp(
    x: torch.Tensor,
    firsts: Sequence[Weight],
    down: Weight,
    first_biases: Sequence[torch.Tensor | None],
    down_bias: torch.Tensor | None,
    gate: Gate,
    *,
    grad_format: Fp8Format = Fp8Format.E4M3,
    caches: tuple[WeightCache | None, WeightCache | None] = (None, None),
) -> torch.Tensor:
    """A whole MLP in FP8, with scales per token: ``down(act(gate(x)) * up(x))``, or without ``up``.

    Args:
        x: BF16 or FP32 [..., H].
        firsts: The weights of gate and up, [I, H] each; or one of [2I, H], gate above up; or one [I, H] without a
            gate. All frozen or none; all stored as FP8 or none.
        down: [H, I]; it may be stored as FP8 too.
        first_biases: As many as ``firsts``; all None, or none.
        down_bias: [H] or None.
        gate: Which activation, and how gate and up are kept.
        grad_format: Format of the codes of gradients.
        caches: Where the codes of the first weights, and of ``down``, are kept over microbatches.
    """
    firsts, first_scales = bits_and_scales(firsts)
    (down,), down_scales = bits_and_scales((down,))
    training = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, *firsts, down, *first_biases, down_bias)
    )
    keep = torch.is_grad_enabled() and firsts[0].requires_grad
    quantized = quantize_input(x, Granularity.TOKEN, True, keep)
    rebuild = None if quantized.source is None else quantized.source.rebuild
    caches = caches if torch.is_grad_enabled() else (None, None)
    return _CoatMLP.apply(
        x, quantized.codes, quantized.scale, keep, rebuild, caches, (first_scales, down_scales), gate,
        grad_format.dtype, compute_dtype(x), training, len(firsts), *firsts, down, *first_biases, down_bias,
        *quantized.kept,
    )  # fmt: skip
