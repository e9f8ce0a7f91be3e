"""Attention that measures itself: exact softmax statistics, diagnosis, intervention."""

from pathlib import Path as _Path

if not (_Path(__file__).parent / "kernels").is_dir():  # source checkout: kernels/ lies beside the package
    __path__.append(str(_Path(__file__).parent.parent))

from .diagnosis import AttentionDiagnosis, StabilityIssue
from .engine.api import attention, attention_stats
from .instrumentation import Instrumentation, instrument
from .interventions import apply_intervention
from .monitoring.analyzer import AttentionAnalyzer
from .monitoring.monitor import AttentionStabilityMonitor
from .monitoring.process_groups import ProcessGroups
from .nn.multihead import MultiheadAttention
from .precheck import StabilityRegion, StabilityReport, check_attention_stability, stability_region
from .statistics.heads import HeadStats
from .statistics.merge import merge_attention
from .statistics.rows import RowStats

Ranks = ProcessGroups  # its name in version 0.1

__all__ = [
    "AttentionAnalyzer",
    "AttentionDiagnosis",
    "AttentionStabilityMonitor",
    "HeadStats",
    "Instrumentation",
    "MultiheadAttention",
    "ProcessGroups",
    "Ranks",
    "RowStats",
    "StabilityIssue",
    "StabilityRegion",
    "StabilityReport",
    "apply_intervention",
    "attention",
    "attention_stats",
    "check_attention_stability",
    "instrument",
    "merge_attention",
    "stability_region",
]
