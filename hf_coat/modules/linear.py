"""``nn.Linear`` whose three matrix products run in FP8, alone or as one with others that read the same input."""

import weakref
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..config import CoatConfig, Region
from ..functional import Adapter, GatheredWeight, StoredWeight, WeightCache, coat_linear, coat_lora

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_hooked(*modules: nn.Module) -> bool:
    """Whether calling one of these modules does more than its class says."""
    return (
        nn.modules.module._has_any_global_hook()
        or any(getattr(m, hooks) for m in modules for hooks in HOOKS)
        or any("forward" in vars(m) for m in modules)  # a hook that offloads brings the weight when it is called
    )


def is_plain(*linears: nn.Module) -> bool:
    """Whether these are ``CoatLinear`` modules whose weights can be used without calling them, all in one way."""
    weights = [linear.weight for linear in linears if type(linear) in (CoatLinear, CoatFrozenLinear)]
    return (
        len(weights) == len(linears)
        and not torch.compiler.is_compiling()
        and not any(is_traceable_wrapper_subclass(w) for w in weights)  # as a sharded one is
        and not is_hooked(*linears)
    )


def can_merge(linears: Sequence[nn.Linear]) -> bool:
    """Whether the weights of these linears can stand below each other in one product."""
    kinds = {
        (m.weight.dtype, m.weight.device, m.weight.requires_grad, isinstance(m.weight, GatheredWeight), m.bias is None)
        for m in linears
    }
    return len(kinds) == 1


def _state(x: torch.Tensor) -> tuple[int | None, bool]:
    """What a result for ``x`` depends on beside its values; tensors of inference mode count no changes."""
    return None if x.is_inference() else x._version, torch.is_grad_enabled()


class Merged:
    """Linears that read one input, q, k and v say, and run as one when the first of them is called.

    The others' results wait until they are called with the very same tensor. Called with another one, or without the
    adapter that was to be theirs, they compute for themselves.

    Args:
        members: The linears.
        owners: The layer that calls each of them: itself, or the LoRA layer around it.
        cache: Where the codes of their weights are kept together, or None.
    """

    def __init__(self, members: list["CoatLinear"], owners: list[nn.Module], cache: WeightCache | None):
        self.members, self.owners, self.cache = members, owners, cache
        self.waiting: dict[int, torch.Tensor] = {}
        self.input = self.adapters = None

    def __call__(self, member: "CoatLinear", x: torch.Tensor, adapter: Adapter | None) -> torch.Tensor | None:
        """What ``member`` gives for ``x``, with the adapter if there is one; None where it must compute for itself."""
        if member is self.members[0]:
            self.waiting.clear()
            if not (is_plain(*self.members) and can_merge(self.members)):
                return None
            self.adapters = [o.coat_adapter() if hasattr(o, "coat_adapter") else None for o in self.owners]
            if (self.adapters[0] is None) != (adapter is None):  # PEFT took its layers away
                self.adapters = [None] * len(self.members)
            ys = member.compute(x, [m.operand for m in self.members], self.biases(), self.cache, self.adapters)
            self.input = weakref.ref(x), _state(x)
            self.waiting.update(enumerate(ys))
            return self.waiting.pop(0)
        if not self.waiting:
            return None
        tensor, state = self.input
        if tensor() is not x or state != _state(x):
            return None
        index = next(i for i, m in enumerate(self.members) if m is member)
        return self.waiting.pop(index, None) if (self.adapters[index] is None) == (adapter is None) else None

    def biases(self) -> list[torch.Tensor] | None:
        return None if self.members[0].bias is None else [m.bias for m in self.members]

    def __getstate__(self):
        return vars(self) | {"waiting": {}, "input": None, "adapters": None}


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
        if parametrize.is_parametrized(self):
            raise RuntimeError(
                "a converted linear was parametrized since: remove that (torch.nn.utils.parametrize."
                "remove_parametrizations) before COAT is removed or applied again"
            )
        del self.coat, self.coat_cache, self.coat_merged, self.coat_region
        self.__class__ = nn.Linear
        return self

    @property
    def operand(self) -> torch.Tensor | StoredWeight:
        """The weight, as the functions of :mod:`hf_coat.functional` take it."""
        return self.weight

    def compute(self, x, weight, bias, cache, adapters=None):
        """:func:`~hf_coat.functional.coat_linear` in this module's way, or with an adapter
        :func:`~hf_coat.functional.coat_lora`."""
        cache = None if torch.compiler.is_compiling() else cache
        if adapters is not None and any(adapters):
            return coat_lora(x, weight, bias, adapters, grad_format=self.coat.grad_format, cache=cache)
        return coat_linear(
            x,
            weight,
            bias,
            granularity=self.coat.granularity,
            power_of_two=self.coat.power_of_two,
            grad_format=self.coat.grad_format,
            cache=cache,
        )

    def forward_with(self, x: torch.Tensor, adapter: Adapter | None) -> torch.Tensor:
        """The linear, and what an adapter adds to it."""
        y = None if self.coat_merged is None or torch.compiler.is_compiling() else self.coat_merged(self, x, adapter)
        return self.compute(x, self.operand, self.bias, self.coat_cache, (adapter,)) if y is None else y

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.forward_with(input, None)

    def extra_repr(self) -> str:
        together = f", one of {len(self.coat_merged.members)}" if self.coat_merged is not None else ""
        region = "" if self.coat_region is None else f", region={self.coat_region.value}"
        return f"{super().extra_repr()}, fp8=per-{self.coat.granularity.value}{together}{region}"


PEFT_MODEL = "base_model.model."  # how the names in the state dict of a PeftModel begin


class CoatFrozenLinear(CoatLinear):
    """A ``CoatLinear`` whose frozen weight exists as FP8 only: a byte for each value, and a scale for each row.

    The forward multiplies the stored codes; the input gradient the same codes, transposed for the moment it takes.

    A state dict holds the dequantized weight under its own name, so that checkpoints are plain, and one is loaded by
    quantizing what it holds. Only a ``PeftModel``'s state dict holds the codes and their scales: what is saved of it
    are the adapters, and the values of the whole base would be made in vain.

    Attributes:
        weight: Parameter, E4M3 codes as uint8 [N, K]: no cast of the model's dtype changes them.
        weight_scale: Buffer, float32 [N, 1], or [1, 1] with a scale per tensor.
        compute_dtype: The dtype of the weight that was stored, and of what :meth:`dequantize` gives.
        coat_name: What the model called it when it was stored.
    """

    compute_dtype: torch.dtype
    coat_name: str = "a linear"

    @classmethod
    def freeze(cls, module: CoatLinear) -> "CoatFrozenLinear":
        """Store the weight of a ``CoatLinear`` (also one on the meta device) as FP8 in place."""
        stored = StoredWeight.of(module.weight, module.coat.granularity, module.coat.power_of_two)
        return cls.hold(module, stored)

    @classmethod
    def hold(cls, module: CoatLinear, stored: StoredWeight) -> "CoatFrozenLinear":
        """Put these codes in the place of a ``CoatLinear``'s weight."""
        module.compute_dtype = module.weight.dtype
        module.weight = nn.Parameter(stored.bits, requires_grad=False)
        module.register_buffer("weight_scale", stored.scale)
        module.coat_cache = None
        module.__class__ = cls
        return module

    def thaw(self) -> CoatLinear:
        """Make this a ``CoatLinear`` again, whose weight are the dequantized values."""
        weight = nn.Parameter(self.dequantize(), requires_grad=False)
        del self.weight_scale, self.compute_dtype
        vars(self).pop("coat_name", None)
        self.weight, self.coat_cache = weight, WeightCache() if self.coat.cache_weights else None
        self.__class__ = CoatLinear
        return self

    def revert(self) -> nn.Linear:
        """Turn the module into an ``nn.Linear`` with the dequantized weight and return it."""
        return self.thaw().revert()

    @property
    def operand(self) -> StoredWeight:
        if self.weight.dtype != torch.uint8:
            raise RuntimeError(
                f"the FP8 codes of a frozen weight were overwritten with {self.weight.dtype}: what merged into them "
                "cannot work with stored FP8. Load or convert the model with CoatConfig(frozen_weights='bf16')"
            )
        return StoredWeight(self.weight, self.weight_scale)

    def dequantize(self) -> torch.Tensor:
        """The weight's values, ``compute_dtype`` [N, K]; the name that PEFT calls."""
        return self.operand.dequantize(self.compute_dtype)

    @property
    def W_q(self) -> torch.Tensor:  # noqa: N802
        """The codes; PEFT knows by this attribute that it must call :meth:`dequantize` (for DoRA, say)."""
        return self.weight

    def requires_grad_(self, requires_grad: bool = True) -> CoatLinear:
        """As of any module; a weight that is to be trained is no longer stored as FP8."""
        return (self.thaw() if requires_grad else super()).requires_grad_(requires_grad)

    def _apply(self, fn, recurse=True):
        scale = self.weight_scale
        dtype = fn(scale.new_empty(0, dtype=self.compute_dtype)).dtype
        super()._apply(fn, recurse)
        self.compute_dtype = dtype
        if self.weight_scale.dtype != torch.float32:  # a cast of the model; scales may not be rounded
            self.weight_scale = scale.to(self.weight.device)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if PEFT_MODEL not in prefix:
            del destination[f"{prefix}weight_scale"]
            weight = self.dequantize()
            destination[f"{prefix}weight"] = weight.cpu() if weight.is_cuda else weight  # the whole model may not fit

    def _load_from_state_dict(self, state_dict, prefix, *args):
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None and weight.is_floating_point():
            stored = StoredWeight.of(weight.to(self.weight.device), self.coat.granularity, self.coat.power_of_two)
            state_dict |= {f"{prefix}weight": stored.bits, f"{prefix}weight_scale": stored.scale}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, stored as FP8"
