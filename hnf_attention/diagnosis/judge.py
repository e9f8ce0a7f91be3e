"""Judging a snapshot: every rule over every layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Protocol

from ..statistics.heads import Snapshot
from .diagnosis import AttentionDiagnosis
from .heads import Heads, concatenate_heads
from .issue import ISSUE_TYPES, SEVERITIES, StabilityIssue
from .rules import HEAD_RULES, MODEL_RULES, HeadRule, ModelRule
from .thresholds import checked_thresholds, overridden

#: Runs a rule by its name. Returns its issues, None if it failed.
Run = Callable[[str, Callable[[], list[StabilityIssue]]], list[StabilityIssue] | None]


class Coverage(Protocol):
    """What a diagnosis needs of an instrumentation's coverage."""

    @property
    def not_measured(self) -> Mapping[str, str]:
        """Layer name to the reason why it was not measured."""


def diagnose(
    history: Iterable[Snapshot],
    coverage: Coverage | None = None,
    thresholds: Mapping[str, float] | None = None,
    run: Run | None = None,
) -> AttentionDiagnosis:
    """Judge the latest snapshot in the light of the earlier ones.

    history: at least one snapshot, oldest first. A single snapshot is judged without trends.
    coverage: an instrumentation's coverage; the diagnosis repeats its `not_measured`.
    thresholds: name of an entry of `thresholds.THRESHOLDS` to the number that is used in its place.
    run: runs each rule, by a name; its None means that the rule failed, which the diagnosis then says. None for no such
        guard: the error of a rule comes out.
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
        judged = {
            **{_name(rule): partial(_of_heads, rule, history, groups) for rule in HEAD_RULES},
            **{_name(rule): partial(_of_model, rule, history, groups) for rule in MODEL_RULES},
        }
        found = {name: look() if run is None else run(f"rule {name}", look) for name, look in judged.items()}
        issues = [issue for some in found.values() for issue in some or ()]

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
        not_judged={name: "the rule failed" for name, some in found.items() if some is None},
    )


def _of_heads(rule: HeadRule, history: list[Snapshot], groups: Sequence[Heads]) -> list[StabilityIssue]:
    return [issue for heads in groups for issue in rule(history, heads)]


def _of_model(rule: ModelRule, history: list[Snapshot], groups: Sequence[Heads]) -> list[StabilityIssue]:
    return list(rule(history, groups))


def _name(rule: Callable[..., object]) -> str:
    return rule.__module__.rpartition(".")[2]
