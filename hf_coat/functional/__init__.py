"""The differentiable functions of COAT: what is computed in FP8, and what is kept in FP8 for the backward."""

from .attention import coat_rotary, keep_attention
from .buckets import write_into_buckets
from .gathered import GatheredWeight
from .linear import coat_linear
from .lora import Adapter, coat_lora
from .mlp import Gate, coat_activation, coat_mlp
from .norm import coat_norm
from .operands import Demand, StoredWeight, Watcher, WeightCache, sampled

__all__ = [
    "Adapter",
    "Demand",
    "Gate",
    "GatheredWeight",
    "StoredWeight",
    "Watcher",
    "WeightCache",
    "coat_activation",
    "coat_linear",
    "coat_lora",
    "coat_mlp",
    "coat_norm",
    "coat_rotary",
    "keep_attention",
    "sampled",
    "write_into_buckets",
]
