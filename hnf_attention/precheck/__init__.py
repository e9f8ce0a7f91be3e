"""Stability before training: from a configuration, a checkpoint, or one sample."""

from .check import check_attention_stability
from .report import StabilityReport

__all__ = ["StabilityReport", "check_attention_stability"]
