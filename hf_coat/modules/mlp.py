"""MLPs of any model that keep what stands between their products as FP8 groups."""

from dataclasses import dataclass, field

import torch

from ..config import Keep
from ..functional import Demand, Gate, WeightCache, coat_activation, coat_mlp
from .converted import Converted
from .linear import can_merge, is_plain


@dataclass
class MLPState:
    """Which MLP a module computes, as its own forward showed, and what it keeps.

    Args:
        firsts: Names of the linears that read the input: gate and up, or the one that gives both, or the only one.
        last: Name of the linear behind the activation; None where the module ends before it.
        act: The activation, see :data:`coat_kernels.activation.ACTIVATIONS`.
        gated: Whether ``act(gate) * up`` or ``act(x)``.
        keep: The activation policy.
        demand: Whether the linear behind the activation wants its codes.
        cache: Where the codes of the first linears' weights are kept together over microbatches, or None.
    """

    firsts: tuple[str, ...]
    last: str | None
    act: str
    gated: bool
    keep: Keep = Keep.LEAN
    demand: Demand = field(default_factory=Demand, compare=False)
    cache: WeightCache | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{'gated ' if self.gated else ''}MLP with {self.act}" if self.last else f"{self.act} of a linear"


class CoatMLP(Converted):
    """An MLP of the model that keeps FP8 groups of what its activation reads; with the policy "lean" and linears that
    nobody watches or replaced, as one function: see :func:`hf_coat.functional.coat_mlp`."""

    coat_state: MLPState

    def forward(self, *args, **kwargs) -> torch.Tensor:
        (x,) = self.positional(args, kwargs)
        state = self.coat_state
        firsts = [getattr(self, name) for name in state.firsts]
        last = None if state.last is None else getattr(self, state.last)
        gate = Gate(state.act, state.gated, self.coat.group_size, self.coat.scale_format)
        lean = state.keep is Keep.LEAN
        if lean and self.coat.granularity == "token" and is_plain(*firsts, last) and can_merge(firsts):
            return coat_mlp(
                x, [m.operand for m in firsts], last.operand, [m.bias for m in firsts], last.bias, gate,
                grad_format=self.coat.grad_format, caches=(state.cache, last.coat_cache),
            )  # fmt: skip
        parts = [linear(x) for linear in firsts]
        if state.gated and len(parts) == 1:
            parts = parts[0].chunk(2, dim=-1)
        h = coat_activation(parts[0], parts[1] if state.gated else None, gate, share=lean, demand=state.demand)
        return h if last is None else last(h)
