"""TRL's arguments with ``coat=``; for its other trainers there is ``hf_coat.with_coat``."""

from .integrations.trl import SFTConfig

__all__ = ["SFTConfig"]
