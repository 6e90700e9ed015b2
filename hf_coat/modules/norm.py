"""RMSNorm and LayerNorm modules of any model that keep their input as FP8 groups."""

from dataclasses import dataclass, field

import torch

from ..config import Keep
from ..functional import Demand, Gate, coat_activation, coat_norm
from .converted import Converted


@dataclass
class NormState:
    """Which norm a module computes, as its own forward showed, and how its input is kept.

    Args:
        center: LayerNorm, which subtracts the mean; else RMSNorm.
        offset: What is added to the weight: 1 where a model stores weight - 1.
        round_first: The normalised values are rounded to the input's dtype before they are multiplied.
        promote: The result has the wider dtype of input and weight; else the input's.
        gate: ``"after"`` or ``"before"`` where a second input is multiplied in through SiLU; else None.
        eps: Name of the attribute with the epsilon.
        keep: The activation policy.
        demand: Whether who reads the result wants its codes.
    """

    center: bool = False
    offset: float = 0.0
    round_first: bool = True
    promote: bool = True
    gate: str | None = None
    eps: str = "eps"
    keep: Keep = Keep.LEAN
    demand: Demand = field(default_factory=Demand, compare=False)

    def __str__(self) -> str:
        name = "LayerNorm" if self.center else "RMSNorm"
        return f"{'gated ' if self.gate else ''}{name}{' with 1 + weight' if self.offset else ''}"


class CoatNorm(Converted):
    """A norm of the model that keeps FP8 groups of its input; see :func:`hf_coat.functional.coat_norm`."""

    coat_state: NormState

    def forward(self, *args, **kwargs) -> torch.Tensor:
        x, gate = (*self.positional(args, kwargs), None)[:2]
        state = self.coat_state
        kept = {"group_size": self.coat.group_size, "scale_format": self.coat.scale_format}
        gating = Gate("silu", True, **kept)
        weight, bias = getattr(self, "weight", None), getattr(self, "bias", None)
        autocast = state.center and torch.is_autocast_enabled(x.device.type)  # runs nn.LayerNorm in float32
        if weight is not None and weight.dtype == torch.bfloat16 != x.dtype and state.gate is None and not autocast:
            return self.coat_original.forward(self, x)  # models differ in what they do, and none does it in training
        dtype = torch.promote_types(x.dtype, weight.dtype) if state.promote and weight is not None else x.dtype
        dtype = torch.float32 if autocast else dtype
        if gate is not None and state.gate == "before":
            x = _gated(x, gate, gating)
        # Where heads stand in front of tokens, [B, N, S, H], memory may hold them the other way round.
        swapped = x.dim() == 4 and x.stride(1) < x.stride(2) and not x.is_contiguous()
        y = coat_norm(
            x.transpose(1, 2) if swapped else x, weight, bias, eps=getattr(self, state.eps), center=state.center,
            offset=state.offset, round_first=state.round_first, out_dtype=dtype, **kept, demand=state.demand,
            share=gate is None and state.keep is Keep.LEAN,
        )  # fmt: skip
        y = y.transpose(1, 2) if swapped else y
        return _gated(y, gate, gating).to(dtype) if gate is not None and state.gate == "after" else y


def _gated(x: torch.Tensor, gate: torch.Tensor, gating: Gate) -> torch.Tensor:
    """``silu(gate) * x`` in the wider of their dtypes: a state space model's scan gives FP32 beside a gate in BF16."""
    dtype = torch.promote_types(x.dtype, gate.dtype)
    return coat_activation(gate.to(dtype), x.to(dtype), gating, share=False)
