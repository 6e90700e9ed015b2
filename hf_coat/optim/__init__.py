"""Optimizers whose states are kept in 8 bits."""

from ..config import OptimizerName
from .adamw import CoatAdamW, CoatOptimizer
from .interop import from_adamw_state_dict, to_adamw_state_dict
from .lion import CoatLion
from .muon import CoatMuon, MuonScale, muon_groups
from .release import GradientRelease

OPTIMIZERS = {OptimizerName.ADAMW: CoatAdamW, OptimizerName.LION: CoatLion, OptimizerName.MUON: CoatMuon}

__all__ = [
    "OPTIMIZERS",
    "CoatAdamW",
    "CoatLion",
    "CoatMuon",
    "CoatOptimizer",
    "GradientRelease",
    "MuonScale",
    "from_adamw_state_dict",
    "muon_groups",
    "to_adamw_state_dict",
]
