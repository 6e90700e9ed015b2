"""Optimizers whose states are kept in FP8."""

from .adamw import CoatAdamW
from .interop import from_adamw_state_dict, to_adamw_state_dict
from .muon import CoatMuon, MuonScale, muon_groups
from .release import GradientRelease

__all__ = [
    "CoatAdamW",
    "CoatMuon",
    "GradientRelease",
    "MuonScale",
    "from_adamw_state_dict",
    "muon_groups",
    "to_adamw_state_dict",
]
