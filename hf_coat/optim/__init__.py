"""Optimizers whose states are kept in FP8."""

from .adamw import CoatAdamW
from .interop import from_adamw_state_dict, to_adamw_state_dict
from .release import GradientRelease

__all__ = ["CoatAdamW", "GradientRelease", "from_adamw_state_dict", "to_adamw_state_dict"]
