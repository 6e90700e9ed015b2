"""COAT for Hugging Face: FP8 linears, FP8 activations and FP8 optimizer states, in models that stay their own.

What is named here is imported when it is first used: ``import hf_coat`` itself imports neither torch nor
transformers. It only sees to it that ``from_pretrained`` knows ``CoatConfig``.
"""

import importlib
from typing import TYPE_CHECKING

from .integrations import register as _register

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import trl as trl
    from .config import CoatConfig, CoatOptimizerConfig, HfCoatConfig
    from .convert import apply_coat, remove_coat
    from .integrations.trainer import CoatCallback, TrainingArguments, with_coat
    from .optim import CoatAdamW, CoatLion, CoatMuon, GradientRelease, muon_groups

_HOMES = {
    "CoatAdamW": "optim",
    "CoatCallback": "integrations.trainer",
    "CoatConfig": "config",
    "CoatLion": "optim",
    "CoatMuon": "optim",
    "CoatOptimizerConfig": "config",
    "GradientRelease": "optim",
    "HfCoatConfig": "config",
    "TrainingArguments": "integrations.trainer",
    "apply_coat": "convert",
    "muon_groups": "optim",
    "remove_coat": "convert",
    "with_coat": "integrations.trainer",
}

__all__ = [
    "CoatAdamW",
    "CoatCallback",
    "CoatConfig",
    "CoatLion",
    "CoatMuon",
    "CoatOptimizerConfig",
    "GradientRelease",
    "HfCoatConfig",
    "TrainingArguments",
    "apply_coat",
    "muon_groups",
    "remove_coat",
    "with_coat",
]


def __getattr__(name: str):
    if name == "trl":  # not in __all__: TRL need not be installed
        return importlib.import_module(".trl", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "trl"})


_register()
