"""Drop-in modules that keep the statistics of what they compute."""

from .cached import KeyValueCache
from .grouped_query import GroupedQueryAttention, QKNorm
from .multihead import MultiheadAttention
from .rotary import Rope
from .rows import row_stats
from .sdpa import ScaledDotProductAttention
from .swap import SwappedAttention, swap_attention

__all__ = [
    "GroupedQueryAttention",
    "KeyValueCache",
    "MultiheadAttention",
    "QKNorm",
    "Rope",
    "ScaledDotProductAttention",
    "SwappedAttention",
    "row_stats",
    "swap_attention",
]
