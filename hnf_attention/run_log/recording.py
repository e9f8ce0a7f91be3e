"""Diagnoses become records of a run log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from ..diagnosis import AttentionDiagnosis, StabilityIssue
from ..diagnosis.thresholds import differing
from ..monitoring.transitions import HOLD, IssueTracker
from . import blocks, metrics
from .records import Layout, Record, issue_dict

#: Kinds of events that a log step tells by itself.
TOLD = ("issue", "thresholds")


class Recording:
    """What a log step's record holds beside its diagnosis: the news since the one before, and what was noted."""

    def __init__(self) -> None:
        self._tracker = IssueTracker()
        self._scalars: dict[str, list[tuple[int, float]]] = {}
        self._events: list[dict[str, Any]] = []
        self._last: Record | None = None
        self._told = False  # whether a log step had thresholds of its own

    def know(self, issues: Iterable[Mapping[str, Any]]) -> None:
        """Issues that were reported before this process began: they are not new."""
        names = [field.name for field in fields(StabilityIssue)]
        reported = [{name: issue[name] for name in names if name in issue} for issue in issues]
        known = [{"issue": issue, "quiet": 0, "active": True, "hold": HOLD} for issue in reported]
        self._tracker.load_state_dict(known)

    def note(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Numbers of a training step."""
        for name, value in scalars.items():
            self._scalars.setdefault(name, []).append((step, float(value)))

    def happened(self, event: dict[str, Any]) -> None:
        """Something with a "kind" and a "step"."""
        self._events.append(event)

    def record(self, diagnosis: AttentionDiagnosis, time: float) -> Record:
        """The record of a log step, with all that was noted since the one before."""
        news = self._tracker.update(diagnosis.issues, judged=not diagnosis.not_judged)
        changes = [(how, issue_dict(issue)) for how, issues in news._asdict().items() for issue in issues]
        snapshot = diagnosis.history[-1] if diagnosis.history else None
        thresholds = differing(diagnosis.thresholds)
        # Every log step tells its own, since another one may be given up. The log keeps what is new to it.
        if thresholds or self._told or self._last is None:
            self._told = bool(thresholds) or self._told
            self.happened({"kind": "thresholds", "step": diagnosis.step, "values": thresholds})
        scalars, self._scalars = self._scalars, {}
        events, self._events = self._events, []
        forwards = (0, 0, 0) if snapshot is None else snapshot.forwards
        self._last = Record(
            step=diagnosis.step,
            first_step=diagnosis.step,
            time=time,
            training=snapshot is None or snapshot.training,
            forwards=tuple(forwards),  # type: ignore[arg-type]
            layout=Layout.of(diagnosis.stats),
            block=blocks.encode(metrics.table(diagnosis.stats)),
            changes=changes,
            events=events,
            scalars=scalars,
            not_measured=dict(diagnosis.not_measured),
        )
        return self._last

    def rest(self, time: float) -> Record | None:
        """The last log step's record again, with what was noted after it; None if nothing was.

        Without a log step it is a record of that time without layers. The first log step tells all of it again.
        """
        last = self._last
        if not (self._scalars or self._events):
            return None
        if last is None:
            steps = [step for pairs in self._scalars.values() for step, _ in pairs]
            step = max([*steps, *(int(event["step"]) for event in self._events)])
            nothing = blocks.encode(metrics.table({}))
            last = Record(step, step, time, True, (0, 0, 0), Layout.of({}), nothing)
        scalars = {
            name: [*last.scalars.get(name, []), *self._scalars.get(name, [])]
            for name in {**last.scalars, **self._scalars}
        }
        found = replace(last, scalars=scalars, events=[*last.events, *self._events])
        if self._last is not None:
            self._last, self._scalars, self._events = found, {}, []
        return found
