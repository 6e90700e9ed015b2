"""The modules of a converted model; they know nothing of trainers."""

from .attention import AttentionState, CoatAttention, is_attention, plain_rotary
from .converted import Converted, convert
from .gather import gather_codes, gather_values, gathered_as_codes
from .linear import CoatFrozenLinear, CoatLinear, Merged
from .lora import CoatLora, LoraState
from .loss import CoatHead, fuse_loss, heads, unfuse_loss
from .mlp import CoatMLP, MLPState
from .norm import CoatNorm, NormState

__all__ = [
    "AttentionState",
    "CoatAttention",
    "CoatFrozenLinear",
    "CoatHead",
    "CoatLinear",
    "CoatLora",
    "CoatMLP",
    "CoatNorm",
    "Converted",
    "LoraState",
    "MLPState",
    "Merged",
    "NormState",
    "convert",
    "fuse_loss",
    "gather_codes",
    "gather_values",
    "gathered_as_codes",
    "plain_rotary",
    "heads",
    "is_attention",
    "unfuse_loss",
]
