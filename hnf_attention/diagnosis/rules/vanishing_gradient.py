"""Heads whose softmax lets almost no gradient through to queries and keys."""

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
    """A small trace of the softmax Jacobian; see `criteria.severities`. A head of low entropy has its issue already."""
    weak = heads.weak & ~heads.low
    if not weak.any():
        return
    share, stderr, scores = (
        heads.stats.jacobian_trace_bound,
        heads.stats.jacobian_trace_bound_stderr,
        Scores(heads),
    )
    lost = weak & (share < threshold("lost_gradient"))
    severity = severities(heads, weak, lost)
    for head in np.flatnonzero(weak).tolist():
        place, value = heads.places[head], share[head]
        name = "lost_gradient" if lost[head] else "weak_gradient"
        evidence = (
            f"{head_name(place)}: at most {value:.2g}{plus_minus(stderr[head])} of the softmax gradient gets "
            f"through at step {history[-1].step} (trace of the softmax Jacobian, mean over rows); "
            f"{scores.text(head)}"
        )
        suggestion = (
            "a trained head may be this sharp on purpose; otherwise raise its attention temperature, because "
            "little gradient reaches its query and key weights"
        )
        brief = (
            f"at most {value:.2g} of the softmax gradient gets through, {scores.short(head)} -> a higher attention "
            "temperature, if the scores grow"
        )
        yield make_issue(
            "vanishing_gradient", severity[head], place, value, name, evidence, suggestion, brief
        )
