"""Heads whose softmax lets almost no gradient through to queries and keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ...statistics.heads import Snapshot
from ..heads import Heads
from ..issue import StabilityIssue
from ..thresholds import threshold
from .criteria import corroborated, sink_by_design
from .wording import head_name, make_issue, plus_minus


def rule(history: Sequence[Snapshot], heads: Heads) -> Iterator[StabilityIssue]:
    """A small trace of the softmax Jacobian is a warning; a lost one is an error if more speaks for it."""
    share = heads.stats.jacobian_trace_bound
    weak = ~sink_by_design(heads) & (share < threshold("weak_gradient"))
    if not weak.any():
        return
    lost = weak & (share < threshold("lost_gradient"))
    real = lost & corroborated(heads, lost)
    stderr = heads.stats.jacobian_trace_bound_stderr
    for head in np.flatnonzero(weak).tolist():
        place, value = heads.places[head], share[head]
        severity, name = ("error", "lost_gradient") if real[head] else ("warning", "weak_gradient")
        evidence = (
            f"{head_name(place)}: at most {value:.2g}{plus_minus(stderr[head])} of the softmax gradient gets "
            f"through at step {history[-1].step} (trace of the softmax Jacobian, mean over rows)"
        )
        suggestion = (
            "a trained head may be this sharp on purpose; otherwise raise its attention temperature, because "
            "little gradient reaches its query and key weights"
        )
        yield make_issue("vanishing_gradient", severity, place, value, name, evidence, suggestion)
