"""Attention that measures itself: exact softmax statistics, diagnosis, intervention."""

from pathlib import Path as _Path

if not (_Path(__file__).parent / "kernels").is_dir():  # source checkout: kernels/ lies beside the package
    __path__.append(str(_Path(__file__).parent.parent))

from .analyzer import AttentionAnalyzer
from .diagnosis import AttentionDiagnosis, StabilityIssue
from .instrument import Instrumentation, instrument
from .interventions import apply_intervention
from .merge import merge_attention
from .monitor import AttentionStabilityMonitor
from .multihead import MultiheadAttention
from .ops import attention, attention_stats
from .ranks import Ranks
from .stats import HeadStats, RowStats

__all__ = [
    "AttentionAnalyzer",
    "AttentionDiagnosis",
    "AttentionStabilityMonitor",
    "HeadStats",
    "Instrumentation",
    "MultiheadAttention",
    "Ranks",
    "RowStats",
    "StabilityIssue",
    "apply_intervention",
    "attention",
    "attention_stats",
    "instrument",
    "merge_attention",
]
