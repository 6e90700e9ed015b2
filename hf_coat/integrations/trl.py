"""``hf_coat.trl.SFTConfig``: TRL's arguments with ``coat=``; for its other trainers there is ``with_coat``."""

import trl

from .model_card import keep_section
from .trainer import with_coat

# TRL's trainers have a card of their own, which their common base writes.
keep_section(next(cls for cls in trl.SFTTrainer.__mro__ if "create_model_card" in vars(cls)))
SFTConfig = with_coat(trl.SFTConfig)
