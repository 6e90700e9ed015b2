"""Lion (arXiv 2302.06675) with its one moment in 8 bits per value; states.py says how it is kept.

As in adamw.py, all arithmetic is float32 between decoding and encoding, and a group in which a gradient or the moment
is not finite is skipped.
"""

import torch

from ._registry import register
from .adamw import check_step, commit, per_parameter
from .states import (
    StateFormat,
    Weights,
    decode_moments,
    encode_moments,
    largest_magnitude,
    read_weights,
    slabs,
    weight_key,
)


def lion_step_ref(
    params, grads, exp_avgs, exp_avg_scales, exp_avg_expansions, residuals, steps, skipped, lr, beta1, beta2,
    weight_decay, group_size, format, weights, seed, numbers, firsts, amax=None,
):  # fmt: skip
    lr, format, weights = lr.item(), StateFormat(format), Weights(weights)
    states = per_parameter(params, exp_avgs, exp_avg_scales, exp_avg_expansions)
    for i, (param, grad, step) in enumerate(zip(params, grads, steps, strict=True)):
        residual = residuals[i] if weights is Weights.MASTER and param.dtype == torch.bfloat16 else None
        key = weight_key(seed, numbers[i], step)
        for begin, p, g, low, *state in slabs(param, grad, residual, *states[i]):
            g = g.float()
            (m,) = decode_moments([state], group_size, format)
            direction = (beta1 * m).add_(g, alpha=1 - beta1).sign_()
            new = (read_weights(p, low) * (1 - lr * weight_decay)).sub_(direction, alpha=lr)
            m = m.mul_(beta2).add_(g, alpha=1 - beta2)
            encoded = encode_moments([m], group_size, format)
            commit(p, new, low, key, firsts[i] + begin, weights, [state], encoded, skipped, group_size)
        if amax is not None:
            amax[i] = largest_magnitude(param)


_lion_step = register(
    "lion_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_scales, "
    "Tensor(d!)[] exp_avg_expansions, Tensor(e!)[] residuals, Tensor[] steps, Tensor(f!) skipped, Tensor lr, "
    "float beta1, float beta2, float weight_decay, int group_size, str format, str weights, int seed, int[] numbers, "
    "int[] firsts, Tensor(g!)? amax=None) -> ()",
    lion_step_ref,
    lambda *args: None,
    "lion_triton:lion_step",
)


def lion_step(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avg: tuple[list[torch.Tensor], ...],
    residuals: list[torch.Tensor],
    steps: list[torch.Tensor],
    skipped: torch.Tensor,
    *,
    lr: float | torch.Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    group_size: int,
    format: StateFormat,
    weights: Weights,
    seed: int,
    numbers: list[int],
    firsts: list[int],
    amax: torch.Tensor | None = None,
) -> None:
    """One Lion step of many parameters of one device, in place (arXiv 2302.06675, algorithm 2).

        p = (1 - lr weight_decay) p - lr sign(beta1 m + (1 - beta1) g)        m = beta2 m + (1 - beta2) g

    Args:
        beta1, beta2, weight_decay: As there: what the step looks at, and what is remembered.

    The others, and what is raised, are those of :func:`~coat_kernels.adamw.adamw_step`.
    """
    if not isinstance(lr, torch.Tensor):
        lr = torch.tensor(lr, dtype=torch.float64, device="cpu")
    moments = {"exp_avg": exp_avg}
    check_step(
        "lion_step", params, grads, moments, residuals, steps, skipped, lr, group_size, format, weights, numbers,
        firsts, amax,
    )  # fmt: skip
    scalars = map(float, (beta1, beta2, weight_decay))
    _lion_step(
        params, grads, *exp_avg, residuals, steps, skipped, lr, *scalars, group_size, format.value, weights.value,
        seed, numbers, firsts, amax,
    )  # fmt: skip
