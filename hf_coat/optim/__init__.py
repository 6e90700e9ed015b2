"""Optimizers whose states are kept in 8 bits."""

from .adamw import CoatAdamW, CoatOptimizer

__all__ = ["CoatAdamW", "CoatOptimizer"]
