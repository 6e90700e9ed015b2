"""``nn.Linear`` whose three matrix products run in FP8."""

import torch
from torch import nn

from ..config import CoatConfig
from ..functional import coat_linear


class CoatLinear(nn.Linear):
    """An ``nn.Linear`` that multiplies in FP8 and keeps FP8 for the backward; see
    :func:`hf_coat.functional.coat_linear`.

    It is never constructed: :meth:`convert` changes the class of a live ``nn.Linear``, so that its parameters, their
        names,
    ties and hooks, and the module object itself, stay what they were. Training and evaluation compute the same
    numbers.

    Attributes:
        coat: The :class:`~hf_coat.config.CoatConfig` that says how it quantizes.
    """

    coat: CoatConfig

    @classmethod
    def convert(cls, module: nn.Linear, config: CoatConfig) -> "CoatLinear":
        """Turn an ``nn.Linear`` (also one on the meta device) into a ``CoatLinear`` in place and return it."""
        module.__class__ = cls
        module.coat = config
        return module

    def revert(self) -> nn.Linear:
        """Undo :meth:`convert` exactly and return the module."""
        del self.coat
        self.__class__ = nn.Linear
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return coat_linear(
            x,
            self.weight,
            self.bias,
            granularity=self.coat.granularity,
            power_of_two=self.coat.power_of_two,
            grad_format=self.coat.grad_format,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, fp8=per-{self.coat.granularity.value}"
