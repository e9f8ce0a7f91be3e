"""Stability before training: from a configuration, a checkpoint, or one sample."""

from .check import check_attention_stability
from .configuration import read_design
from .design import Design
from .model_class import known_design
from .region import StabilityRegion, stability_region
from .report import StabilityReport

__all__ = [
    "Design",
    "StabilityRegion",
    "StabilityReport",
    "check_attention_stability",
    "known_design",
    "read_design",
    "stability_region",
]
