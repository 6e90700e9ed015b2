"""A linear with LoRA adapters beside it, as PEFT builds it, that keeps its input once, in FP8, for base and adapter.

PEFT's layer stays what it is: its parameters, its names, its files, and everything it can do. Only its forward takes a
shorter way where it is that of plain LoRA: one active adapter that is not merged, and no variant of it.
"""

from dataclasses import dataclass, field

import torch
from coat_kernels import Granularity
from torch import nn

from ..config import CoatConfig
from ..functional import Adapter, StoredWeight
from .converted import Converted
from .linear import CoatFrozenLinear, CoatLinear, Merged, is_hooked, is_plain


@dataclass
class LoraState:
    """What a converted LoRA layer needs.

    Args:
        before_merge: While adapters are merged, the FP8 base without them; else None.
        coat: The :class:`~hf_coat.config.CoatConfig` of that base.
        together: The linears that it ran together with, or None.
    """

    before_merge: StoredWeight | None = field(default=None, compare=False)
    coat: CoatConfig | None = field(default=None, compare=False)
    together: Merged | None = field(default=None, compare=False)


class CoatLora(Converted):
    """A LoRA layer of PEFT over a :class:`CoatLinear`; see :func:`hf_coat.functional.coat_lora`.

    DoRA and other variants, several active adapters, one with a bias of its own and calls with ``adapter_names`` go
    PEFT's own way, over the base in FP8.
    """

    coat_state: LoraState

    def coat_adapter(self) -> Adapter | None:
        """The adapter, if the layer is plain LoRA now; None where PEFT's own forward must decide."""
        base = self.base_layer
        active = [name for name in self.active_adapters if name in self.lora_A]
        if (
            len(active) != 1
            or self.disable_adapters
            or self.merged
            or active[0] in self.lora_variant
            or not is_plain(base)
            or base.weight.requires_grad
            or base.coat.granularity is not Granularity.TOKEN
        ):
            return None
        down, up, dropout = (part[active[0]] for part in (self.lora_A, self.lora_B, self.lora_dropout))
        if type(dropout) not in (nn.Identity, nn.Dropout) or is_hooked(down, up, dropout):
            return None
        if any(type(part) is not nn.Linear or part.bias is not None for part in (down, up)):
            return None
        p = dropout.p if self.training and type(dropout) is nn.Dropout else 0.0
        return Adapter(down.weight, up.weight, self.scaling[active[0]], p)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        adapter = None if args or kwargs else self.coat_adapter()
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        return self.base_layer.forward_with(x, adapter)

    def merge(self, *args, **kwargs) -> None:
        """As PEFT does it, into an ``nn.Linear`` of the dequantized base: FP8 would round away what merging adds."""
        base, state = self.base_layer, self.coat_state
        if isinstance(base, CoatFrozenLinear):
            state.before_merge, state.coat, state.together = base.operand, base.coat, base.coat_merged
            base.revert()
        try:
            super().merge(*args, **kwargs)
        finally:
            self._store_again()

    def unmerge(self) -> None:
        """As PEFT does it; a base that was stored as FP8 is that again, with the very same codes."""
        super().unmerge()
        self._store_again()

    def _store_again(self) -> None:
        state = self.coat_state
        if state.before_merge is not None and not self.merged:
            base = CoatFrozenLinear.hold(CoatLinear.convert(self.base_layer, state.coat), state.before_merge)
            base.coat_merged = state.together
            state.before_merge = state.coat = state.together = None
