"""FP8 modules. They know nothing of transformers: each is a torch module that changed its class in place."""

from .linear import CoatLinear

__all__ = ["CoatLinear"]
