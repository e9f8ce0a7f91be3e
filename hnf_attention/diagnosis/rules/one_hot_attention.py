"""Heads that put nearly all weight on one key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ...statistics.heads import Snapshot
from ..heads import Heads
from ..issue import StabilityIssue
from ..thresholds import threshold
from .criteria import sink_by_design
from .wording import head_name, make_issue, plus_minus


def rule(history: Sequence[Snapshot], heads: Heads) -> Iterator[StabilityIssue]:
    """A warning for heads whose rows' largest weight is nearly 1 on average, sinks aside."""
    stats = heads.stats
    weight = stats.max_weight
    one_hot = ~sink_by_design(heads) & (weight > threshold("one_hot_weight"))
    if not one_hot.any():
        return
    stderr, sink = stats.max_weight_stderr, stats.sink_mass
    for head in np.flatnonzero(one_hot).tolist():
        place, value = heads.places[head], weight[head]
        evidence = (
            f"{head_name(place)}: the largest weight of a row is {value:.3f}{plus_minus(stderr[head])} "
            f"on average at step {history[-1].step}; the first key gets {sink[head]:.2f}"
        )
        suggestion = (
            "raise the layer's attention dropout if most of its heads do this; one may do so on purpose"
        )
        yield make_issue("one_hot_attention", "warning", place, value, "one_hot_weight", evidence, suggestion)
