"""Optimizers whose states are kept in 8 bits."""

from .adamw import CoatAdamW, CoatOptimizer
from .lion import CoatLion

__all__ = ["CoatAdamW", "CoatLion", "CoatOptimizer"]
