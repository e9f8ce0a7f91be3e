"""Judging a snapshot: every rule over every layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from ..statistics.heads import Snapshot
from .diagnosis import AttentionDiagnosis
from .heads import concatenate_heads
from .issue import ISSUE_TYPES, SEVERITIES, StabilityIssue
from .rules import HEAD_RULES, MODEL_RULES
from .thresholds import checked_thresholds, overridden


class Coverage(Protocol):
    """What a diagnosis needs of an instrumentation's coverage."""

    @property
    def not_measured(self) -> Mapping[str, str]:
        """Layer name to the reason why it was not measured."""


def diagnose(
    history: Iterable[Snapshot],
    coverage: Coverage | None = None,
    thresholds: Mapping[str, float] | None = None,
) -> AttentionDiagnosis:
    """Judge the latest snapshot in the light of the earlier ones.

    history: at least one snapshot, oldest first. A single snapshot is judged without trends.
    coverage: an instrumentation's coverage; the diagnosis repeats its `not_measured`.
    thresholds: name of an entry of `thresholds.THRESHOLDS` to the number that is used in its place.
    The diagnosis holds at most one issue per (layer, head, type), errors first.
    Raises ValueError for an empty history, and for a threshold of another name or that is no finite number.
    """
    history = list(history)
    if not history:
        raise ValueError("expected at least one snapshot to diagnose, got none")
    chosen = checked_thresholds(thresholds)
    latest = history[-1]
    layers = {layer: place for place, layer in enumerate(latest.layers)}
    with overridden(chosen):
        groups = concatenate_heads(history, layers)
        issues = [issue for heads in groups for rule in HEAD_RULES for issue in rule(history, heads)]
        issues += [issue for rule in MODEL_RULES for issue in rule(history, groups)]

    def order(issue: StabilityIssue) -> tuple[int, int, int, int]:
        head = -1 if issue.head is None else issue.head
        kind = ISSUE_TYPES.index(issue.issue_type)
        return SEVERITIES.index(issue.severity), kind, layers.get(issue.layer, -1), head

    return AttentionDiagnosis(
        issues=sorted(issues, key=order),
        stats=dict(latest.layers),
        step=latest.step,
        history=history,
        not_measured={} if coverage is None else dict(coverage.not_measured),
        thresholds=chosen,
    )
