"""Fixes that can be applied and reverted, and which one to choose. They touch models, never kernels."""

from .action import Action, Preview, Verdict
from .apply import Applied, apply_intervention, plan_intervention
from .follow_up import FollowUp
from .good_states import GoodStates, name_checkpoint
from .intervention import Intervention
from .penalty import AttentionPenalty
from .policy import InterventionPolicy
from .prune import loss_change
from .qk_norm import start_qk_norm
from .standing_clip import QKClip

__all__ = [
    "Action",
    "Applied",
    "AttentionPenalty",
    "FollowUp",
    "GoodStates",
    "Intervention",
    "InterventionPolicy",
    "Preview",
    "QKClip",
    "Verdict",
    "apply_intervention",
    "loss_change",
    "name_checkpoint",
    "plan_intervention",
    "start_qk_norm",
]
