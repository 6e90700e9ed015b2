"""Optimizers whose states are kept in FP8."""

from .adamw import CoatAdamW
from .release import GradientRelease

__all__ = ["CoatAdamW", "GradientRelease"]
