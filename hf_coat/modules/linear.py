"""``nn.Linear`` whose three matrix products run in FP8, alone or as one with others that read the same input."""

import weakref
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..config import CoatConfig, Region
from ..functional import WeightCache, coat_linear


def is_plain(*linears: nn.Module) -> bool:
    """Whether these are ``CoatLinear`` modules whose weights can be used without calling them, all in one way."""
    weights = [linear.weight for linear in linears if type(linear) is CoatLinear]
    return (
        len(weights) == len(linears)
        and not torch.compiler.is_compiling()
        and not any(is_traceable_wrapper_subclass(w) for w in weights)  # as a sharded one is
        and not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in linears)
        and not any("forward" in vars(m) for m in linears)  # a hook that offloads brings the weight when it is called
    )


def can_merge(linears: Sequence[nn.Linear]) -> bool:
    """Whether the weights of these linears can stand below each other in one product."""
    kinds = {(m.weight.dtype, m.weight.device, m.weight.requires_grad, m.bias is None) for m in linears}
    return len(kinds) == 1


class Merged:
    """Linears that read one input, q, k and v say, and run as one when the first of them is called.

    The others' results wait until they are called with the very same tensor. Called with another one, they compute
    for themselves.
    """

    def __init__(self, members: list["CoatLinear"], cache: WeightCache | None):
        self.members, self.cache = members, cache
        self.waiting: dict[int, torch.Tensor] = {}
        self.input = None

    def __call__(self, member: "CoatLinear", x: torch.Tensor) -> torch.Tensor | None:
        """What ``member`` gives for ``x``, or None where it must compute for itself."""
        if member is self.members[0]:
            self.waiting.clear()
            if not (is_plain(*self.members) and can_merge(self.members)):
                return None
            ys = member.compute(x, [m.weight for m in self.members], self.biases(), self.cache)
            self.input = weakref.ref(x), x._version, torch.is_grad_enabled()
            self.waiting.update(enumerate(ys))
            return self.waiting.pop(0)
        if not self.waiting:
            return None
        tensor, version, grad = self.input
        if tensor() is not x or (version, grad) != (x._version, torch.is_grad_enabled()):
            return None
        return self.waiting.pop(next(i for i, m in enumerate(self.members) if m is member), None)

    def biases(self) -> list[torch.Tensor] | None:
        return None if self.members[0].bias is None else [m.bias for m in self.members]

    def __getstate__(self):
        return {"members": self.members, "cache": self.cache, "waiting": {}, "input": None}


class CoatLinear(nn.Linear):
    """An ``nn.Linear`` that multiplies in FP8 and keeps FP8 for the backward; see
    :func:`hf_coat.functional.coat_linear`.

    It is never constructed: :meth:`convert` changes the class of a live ``nn.Linear``, so that its parameters, their
    names, ties and hooks, and the module object itself, stay what they were. Training and evaluation compute the same
    numbers.

    Attributes:
        coat: The :class:`~hf_coat.config.CoatConfig` that says how it quantizes.
        coat_cache: Where its weight's codes are kept over microbatches, or None.
        coat_merged: The linears that it runs together with, or None.
        coat_region: The region of a vision-language model that it is in; see :mod:`hf_coat.policy`.
    """

    coat: CoatConfig
    coat_region: Region | None
    coat_cache: WeightCache | None
    coat_merged: Merged | None

    @classmethod
    def convert(cls, module: nn.Linear, config: CoatConfig, region: Region | None = None) -> "CoatLinear":
        """Turn an ``nn.Linear`` (also one on the meta device) into a ``CoatLinear`` in place and return it."""
        module.__class__ = cls
        module.coat, module.coat_region = config, region
        module.coat_cache = WeightCache() if config.cache_weights else None
        module.coat_merged = None
        return module

    def revert(self) -> nn.Linear:
        """Undo :meth:`convert` exactly and return the module."""
        del self.coat, self.coat_cache, self.coat_merged, self.coat_region
        self.__class__ = nn.Linear
        return self

    def compute(self, x, weight, bias, cache):
        """:func:`~hf_coat.functional.coat_linear` in this module's way."""
        return coat_linear(
            x,
            weight,
            bias,
            granularity=self.coat.granularity,
            power_of_two=self.coat.power_of_two,
            grad_format=self.coat.grad_format,
            cache=None if torch.compiler.is_compiling() else cache,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = None if self.coat_merged is None or torch.compiler.is_compiling() else self.coat_merged(self, x)
        return self.compute(x, self.weight, self.bias, self.coat_cache) if y is None else y

    def extra_repr(self) -> str:
        together = f", one of {len(self.coat_merged.members)}" if self.coat_merged is not None else ""
        region = "" if self.coat_region is None else f", region={self.coat_region.value}"
        return f"{super().extra_repr()}, fp8=per-{self.coat.granularity.value}{together}{region}"
