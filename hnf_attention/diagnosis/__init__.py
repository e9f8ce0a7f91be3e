"""From head statistics to issues. It reads arrays only, never a model."""

from .diagnosis import AttentionDiagnosis
from .issue import StabilityIssue
from .judge import diagnose

__all__ = ["AttentionDiagnosis", "StabilityIssue", "diagnose"]
