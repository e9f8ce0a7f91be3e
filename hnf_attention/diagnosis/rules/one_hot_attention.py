"""Heads that put nearly all weight on one key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ...statistics.heads import Snapshot
from ..heads import Heads
from ..issue import StabilityIssue
from ..thresholds import threshold
from .criteria import severities
from .wording import Scores, head_name, make_issue, plus_minus


def rule(history: Sequence[Snapshot], heads: Heads) -> Iterator[StabilityIssue]:
    """Rows whose largest weight is nearly 1 on average, sinks aside, in heads that no other rule calls sharp."""
    stats = heads.stats
    weight = stats.max_weight
    one_hot = ~heads.resting & (weight > threshold("one_hot_weight")) & ~heads.low & ~heads.weak
    if not one_hot.any():
        return
    stderr, scores = stats.max_weight_stderr, Scores(heads)
    severity = severities(heads, one_hot, np.zeros_like(one_hot))
    for head in np.flatnonzero(one_hot).tolist():
        place, value = heads.places[head], weight[head]
        evidence = (
            f"{head_name(place)}: the largest weight of a row is {value:.3f}{plus_minus(stderr[head])} "
            f"on average at step {history[-1].step}; {scores.text(head)}"
        )
        suggestion = "watch whether the scores rise; a trained head may do so on purpose"
        brief = f"largest weight of a row {value:.3f}, {scores.short(head)} -> watch its scores"
        yield make_issue(
            "one_hot_attention", severity[head], place, value, "one_hot_weight", evidence, suggestion, brief
        )
