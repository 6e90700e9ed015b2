"""The modules of a converted model; they know nothing of trainers."""

from .attention import AttentionState, CoatAttention, has_plain_rotary, is_attention
from .converted import Converted, convert
from .linear import CoatLinear, Merged
from .loss import CoatHead, fuse_loss, unfuse_loss
from .mlp import CoatMLP, MLPState
from .norm import CoatNorm, NormState

__all__ = [
    "AttentionState",
    "CoatAttention",
    "CoatHead",
    "CoatLinear",
    "CoatMLP",
    "CoatNorm",
    "Converted",
    "MLPState",
    "Merged",
    "NormState",
    "convert",
    "fuse_loss",
    "has_plain_rotary",
    "is_attention",
    "unfuse_loss",
]
