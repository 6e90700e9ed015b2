"""AdamW with its moments in 8 bits per value and its BF16 weights in 16 or 24; states.py says how they are kept.

A step decodes the moments to float32, does what AdamW does, rounds the weights once, and encodes the new moments. A
group in which a gradient, or a moment that follows from it, is not finite is skipped: its weights and moments stay as
they are, bit for bit, and ``skipped`` counts it. (On a GPU a second moment over 1 - beta2 has to be finite, too: with
gradients of 1.8e19 and more it is not.)
"""

import torch

from ._registry import register
from .states import (
    MAX_GROUP_SIZE,
    PARAMETER_DTYPES,
    StateFormat,
    Weights,
    decode_moments,
    encode_moments,
    group_shape,
    largest_magnitude,
    read_weights,
    round_weights,
    slabs,
    spread,
    weight_key,
)


def commit(param, new, residual, key, first, weights, states, encoded, skipped, group_size):
    """Write new float32 weights and freshly encoded moments, but for the groups that are not finite: count those."""
    broken = ~torch.stack([scale.isfinite() for _, scale, _ in encoded]).all(dim=0)
    skipped += broken.sum()
    broken_values = spread(broken, param.shape, group_size)
    rounded, low = round_weights(new, param.dtype, weights, key, first)
    pairs = [(param, rounded)] if low is None else [(param, rounded), (residual, low)]
    for state, fresh in zip(states, encoded, strict=True):
        pairs += [(old, tensor) for old, tensor in zip(state, fresh, strict=True) if tensor is not None]
    for old, tensor in pairs:
        old.copy_(torch.where(broken_values if old.shape == param.shape else broken, old, tensor))


def per_parameter(params, codes, scales, expansions):
    """The states of one moment, ``(codes, scale, expansion)`` of each parameter; without expansions those are None."""
    return list(zip(codes, scales, expansions or [None] * len(params), strict=True))


def adamw_step_ref(
    params, grads, exp_avgs, exp_avg_scales, exp_avg_expansions, exp_avg_sqs, exp_avg_sq_scales, exp_avg_sq_expansions,
    residuals, steps, skipped, lr, beta1, beta2, eps, weight_decay, group_size, format, weights, seed, numbers,
    firsts, amax=None,
):  # fmt: skip
    lr, format, weights = lr.item(), StateFormat(format), Weights(weights)
    first = per_parameter(params, exp_avgs, exp_avg_scales, exp_avg_expansions)
    second = per_parameter(params, exp_avg_sqs, exp_avg_sq_scales, exp_avg_sq_expansions)
    for i, (param, grad, step) in enumerate(zip(params, grads, steps, strict=True)):
        residual = residuals[i] if weights is Weights.MASTER and param.dtype == torch.bfloat16 else None
        correction1, correction2 = 1 - beta1 ** step.item(), 1 - beta2 ** step.item()
        key = weight_key(seed, numbers[i], step)
        for begin, p, g, low, *both in slabs(param, grad, residual, *first[i], *second[i]):
            states, g = [tuple(both[:3]), tuple(both[3:])], g.float()
            m, v = decode_moments(states, group_size, format)
            m = m.mul_(beta1).add_(g, alpha=1 - beta1)
            v = v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            denominator = v.sqrt().div_(correction2**0.5).add_(eps)
            new = read_weights(p, low) * (1 - lr * weight_decay)
            new.addcdiv_(m, denominator, value=-lr / correction1)
            encoded = encode_moments([m, v], group_size, format)
            commit(p, new, low, key, firsts[i] + begin, weights, states, encoded, skipped, group_size)
        if amax is not None:
            amax[i] = largest_magnitude(param)


_adamw_step = register(
    "adamw_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_scales, "
    "Tensor(d!)[] exp_avg_expansions, Tensor(e!)[] exp_avg_sqs, Tensor(f!)[] exp_avg_sq_scales, "
    "Tensor(g!)[] exp_avg_sq_expansions, Tensor(h!)[] residuals, Tensor[] steps, Tensor(i!) skipped, Tensor lr, "
    "float beta1, float beta2, float eps, float weight_decay, int group_size, str format, str weights, int seed, "
    "int[] numbers, int[] firsts, Tensor(j!)? amax=None) -> ()",
    adamw_step_ref,
    lambda *args: None,
    "adamw_triton:adamw_step",
)


def check_step(
    op, params, grads, moments, residuals, steps, skipped, lr, group_size, format, weights, numbers, firsts, amax
):
    """Refuse what an optimizer's step cannot take; ``moments`` are (codes, scales, expansions) by name."""
    if not 1 <= group_size <= MAX_GROUP_SIZE:
        raise ValueError(f"{op}: group_size is {group_size}, expected 1 to {MAX_GROUP_SIZE}")
    side = [group_shape(param.shape, group_size) for param in params]
    own = [param.shape for param in params]
    expected = {}  # by name: the tensors, their dtype, their shapes
    for name, (codes, scales, expansions) in moments.items():
        expected[f"{name}s"] = codes, torch.uint8, own
        expected[f"{name}_scales"] = scales, torch.float32, side
        if format.expands or expansions:
            expected[f"{name}_expansions"] = expansions, torch.uint8, side if format.expands else []
    if weights is Weights.MASTER or residuals:
        shapes = [param.shape if param.dtype == torch.bfloat16 else torch.Size([0]) for param in params]
        expected["residuals"] = residuals, torch.uint8, shapes if weights is Weights.MASTER else []
    counted = {"grads": grads, "steps": steps, "numbers": numbers, "firsts": firsts}
    counted |= {k: v[0] for k, v in expected.items() if v[2]}
    for name, values in counted.items():
        if len(values) != len(params):
            raise ValueError(f"{op}: {len(values)} {name} for {len(params)} params")
    if skipped.dtype != torch.int64 or skipped.numel() != 1:
        raise ValueError(f"{op}: skipped is {skipped.dtype} {list(skipped.shape)}, expected one torch.int64 count")
    if amax is not None and (
        amax.dtype != torch.float32
        or amax.shape != (len(params),)
        or amax.device != skipped.device
        or not amax.is_contiguous()
    ):
        raise ValueError(
            f"{op}: amax is {amax.dtype} {list(amax.shape)} on {amax.device}, expected contiguous torch.float32 "
            f"[{len(params)}] on {skipped.device}, a number for each of the params"
        )
    if lr.numel() != 1:
        raise ValueError(f"{op}: lr has the shape {list(lr.shape)}, expected one number")
    for name, tensors in (("params", params), ("grads", grads)):
        for i, (param, tensor) in enumerate(zip(params, tensors, strict=True)):
            if tensor.dtype not in PARAMETER_DTYPES or tensor.layout != torch.strided:
                raise TypeError(
                    f"{op}: {name}[{i}] is {tensor.dtype} ({tensor.layout}), expected dense torch.bfloat16 or "
                    "torch.float32"
                )
            if tensor.shape != param.shape or tensor.device != skipped.device:
                raise ValueError(
                    f"{op}: {name}[{i}] is {list(tensor.shape)} on {tensor.device}, expected {list(param.shape)} on "
                    f"{skipped.device} as its parameter and the count of skipped groups"
                )
    for name, (tensors, dtype, shapes) in expected.items():
        if tensors and not shapes and params:
            raise ValueError(f"{op}: {len(tensors)} {name}, expected none with {format} and {weights}")
        for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
            fits = tensor.dtype == dtype and tensor.shape == shape and tensor.device == skipped.device
            if not fits or not tensor.is_contiguous():
                raise ValueError(
                    f"{op}: {name}[{i}] is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, expected "
                    f"contiguous {dtype} {list(shape)} on {skipped.device}"
                )
    devices = {step.device for step in steps}
    if len(devices) > 1 or not devices <= {torch.device("cpu"), skipped.device}:
        raise ValueError(f"{op}: steps are on {devices}, expected all on the CPU or all on {skipped.device}")
    for i, step in enumerate(steps):
        if step.numel() != 1:
            raise ValueError(f"{op}: steps[{i}] has the shape {list(step.shape)}, expected one number")


def adamw_step(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avg: tuple[list[torch.Tensor], ...],
    exp_avg_sq: tuple[list[torch.Tensor], ...],
    residuals: list[torch.Tensor],
    steps: list[torch.Tensor],
    skipped: torch.Tensor,
    *,
    lr: float | torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    group_size: int,
    format: StateFormat,
    weights: Weights,
    seed: int,
    numbers: list[int],
    firsts: list[int],
    amax: torch.Tensor | None = None,
) -> None:
    """One AdamW step of many parameters of one device, in place, with moments of 8 bits per value (paper section 3).

        m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g**2
        p = (1 - lr weight_decay) p - lr m / (1 - beta1**step) / (sqrt(v / (1 - beta2**step)) + eps)

    Args:
        params: BF16 or FP32 parameters of any shapes and strides.
        grads: Their gradients, BF16 or FP32 each.
        exp_avg, exp_avg_sq: Each moment as lists of codes, scales and expansions as in
            :func:`~coat_kernels.states.encode_moments`, contiguous; the last one empty where the format has none. At
            first codes and scales are zero and expansions 16.
        residuals: With :attr:`Weights.MASTER` uint8 of each BF16 parameter's shape, at first zero, and an empty tensor
            for each FP32 parameter; else an empty list.
        steps: The number of each parameter's step, this one included: one number each. On the device a step may be
            captured in a CUDA graph; on the CPU it costs fewer launches.
        skipped: One int64 on the device; the number of groups that were skipped for lack of finiteness is added to it.
        lr: Learning rate, a number or a tensor of one number; on the device it is read without waiting for it.
        beta1, beta2, eps, weight_decay: As in ``torch.optim.AdamW``.
        group_size: Values per group, 1 to 1024.
        format: How the moments are kept.
        weights: How BF16 parameters are rounded or kept.
        seed, numbers, firsts: What stochastic rounding depends on beside the step: the run's seed, the number of each
            parameter in the run, and the index of its first value in the whole parameter, of which it may be a piece.
        amax: If given, float32 of one number per parameter, to be overwritten with the largest magnitude of its new
            values as they are stored, those that were skipped included; NaN where one of them is.

    Raises:
        TypeError, ValueError: For dtypes, shapes or devices that do not fit; the message names the tensor.
    """
    moments = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    if not isinstance(lr, torch.Tensor):
        lr = torch.tensor(lr, dtype=torch.float64, device="cpu")
    check_step(
        "adamw_step", params, grads, moments, residuals, steps, skipped, lr, group_size, format, weights, numbers,
        firsts, amax,
    )  # fmt: skip
    scalars = map(float, (beta1, beta2, eps, weight_decay))
    _adamw_step(
        params, grads, *exp_avg, *exp_avg_sq, residuals, steps, skipped, lr, *scalars, group_size, format.value,
        weights.value, seed, numbers, firsts, amax,
    )  # fmt: skip
