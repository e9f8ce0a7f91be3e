"""Triage of a run with NaN or inf: from the record of a step to the cause. It reads records only, never a model."""

from .causes import CAUSES
from .finding import NonFiniteTrace, WideReplay

__all__ = ["CAUSES", "NonFiniteTrace", "WideReplay"]
