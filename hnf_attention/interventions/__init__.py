"""Fixes that can be applied and reverted, and which one to choose. They touch models, never kernels."""

from .apply import Applied, apply_intervention
from .intervention import Intervention
from .policy import InterventionPolicy
from .qk_norm import start_qk_norm
from .standing_clip import QKClip

__all__ = ["Applied", "Intervention", "InterventionPolicy", "QKClip", "apply_intervention", "start_qk_norm"]
