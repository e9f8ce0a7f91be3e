"""Fixes that can be applied and reverted, and which one to choose. They touch models, never kernels."""

from .apply import Applied, apply_intervention
from .good_states import GoodStates, name_checkpoint
from .intervention import Intervention
from .policy import InterventionPolicy
from .qk_norm import start_qk_norm
from .standing_clip import QKClip

__all__ = [
    "Applied",
    "GoodStates",
    "Intervention",
    "InterventionPolicy",
    "QKClip",
    "apply_intervention",
    "name_checkpoint",
    "start_qk_norm",
]
