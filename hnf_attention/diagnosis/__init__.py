"""From head statistics to issues. Reads numpy arrays only, never a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..statistics.heads import Snapshot
from .heads import concatenate_heads
from .issue import ISSUE_TYPES, SEVERITIES, AttentionDiagnosis, StabilityIssue
from .rules import RULES

__all__ = ["AttentionDiagnosis", "StabilityIssue", "diagnose"]


def diagnose(history: Iterable[Snapshot], coverage: Any = None) -> AttentionDiagnosis:
    """Judge the latest snapshot in the light of those before it.

    history: snapshots, oldest first, at least one; a single one is judged without trends.
    coverage: an instrumentation's coverage, whose `not_measured` the diagnosis repeats.
    At most one issue per (layer, head, kind), errors first. Raises ValueError for an empty history.
    """
    history = list(history)
    if not history:
        raise ValueError("expected at least one snapshot to diagnose, got none")
    latest = history[-1]
    layers = list(latest.layers)
    issues = [
        issue
        for heads in concatenate_heads(history, layers)
        for rule in RULES
        for issue in rule(history, heads)
    ]

    def order(issue: StabilityIssue) -> tuple[int, int, int, int]:
        head = -1 if issue.head is None else issue.head
        kind = ISSUE_TYPES.index(issue.issue_type)
        return SEVERITIES.index(issue.severity), kind, layers.index(issue.layer), head

    not_measured = dict(coverage.not_measured) if coverage is not None else {}
    return AttentionDiagnosis(
        issues=sorted(issues, key=order),
        stats=dict(latest.layers),
        step=latest.step,
        history=history,
        not_measured=not_measured,
    )
