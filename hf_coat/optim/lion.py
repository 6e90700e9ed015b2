"""Lion (arXiv 2302.06675) with its state in 8 bits per value as a torch optimizer."""

from collections.abc import Iterable
from typing import Any

import torch
from coat_kernels.lion import lion_step
from coat_kernels.states import StateFormat, Weights

from .adamw import CoatOptimizer


class CoatLion(CoatOptimizer):
    r"""Lion with its moment in 8 bits: 1.03 bytes of state per parameter.

        p = (1 - lr weight_decay) p - lr sign(beta1 m + (1 - beta1) g)        m = beta2 m + (1 - beta2) g

    Every value moves by ``lr``, so a learning rate is 3 to 10 times smaller than AdamW's, and the weight decay as many
    times larger (section 5 of the paper). The format ``lean`` keeps the root of \|m\| in equal steps. Groups,
    gradients that are not finite, checkpoints and the settings beside these are those of :class:`CoatAdamW`; the state
    is ``step``, ``exp_avg_codes``, ``exp_avg_scale``, in ``paper`` ``exp_avg_expansion``, and ``weight_residual``.

    Args:
        params: Parameters, named parameters or parameter groups: BF16 or FP32, of any shape. Gradients may be either.
        lr: Learning rate, a number or a tensor of one number.
        betas: Weights of the moment in the step, and in itself.
        weight_decay: Decoupled weight decay.
        group_size, format, weights, seed, capturable: As in :class:`CoatAdamW`.

    Raises:
        TypeError: For parameters that are neither BF16 nor FP32.
        ValueError: For a setting out of its range.
    """

    MOMENTS = ("exp_avg",)
    SETTINGS = ("lr", "betas", "weight_decay", "group_size", "format", "weights", "seed", "capturable")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        group_size: int = 128,
        format: StateFormat | str = StateFormat.LEAN,
        weights: Weights | str = Weights.STOCHASTIC,
        seed: int = 0,
        capturable: bool = False,
    ):
        values = (lr, betas, weight_decay, group_size, format, weights, seed, capturable)
        super().__init__(params, dict(zip(self.SETTINGS, values, strict=True)))

    def _step_device(self, group, params, grads, moments, residuals, steps, skipped, others) -> None:
        lion_step(
            params,
            grads,
            *moments,
            residuals,
            steps,
            skipped,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            group_size=group["group_size"],
            format=StateFormat(group["format"]),
            weights=Weights(group["weights"]),
            seed=group["seed"],
            **others,
        )
