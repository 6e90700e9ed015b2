"""``hf_coat.trl.SFTConfig``: TRL's arguments with ``coat=``; for its other trainers there is ``with_coat``."""

import trl

from .trainer import with_coat

SFTConfig = with_coat(trl.SFTConfig)
