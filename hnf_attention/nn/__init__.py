"""Drop-in modules that keep the statistics of what they compute."""

from .grouped_query import GroupedQueryAttention, QKNorm
from .multihead import MultiheadAttention
from .rotary import Rope
from .rows import row_stats
from .sdpa import ScaledDotProductAttention

__all__ = [
    "GroupedQueryAttention",
    "MultiheadAttention",
    "QKNorm",
    "Rope",
    "ScaledDotProductAttention",
    "row_stats",
]
