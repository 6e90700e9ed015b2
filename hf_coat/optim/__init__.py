"""Optimizers whose states are kept in FP8."""

from .adamw import CoatAdamW

__all__ = ["CoatAdamW"]
