"""The diagnosis over a record, as a monitor would have given it while the run trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from hnf_attention.diagnosis import AttentionDiagnosis, diagnose
from hnf_attention.diagnosis.ahead import Watch
from hnf_attention.monitoring.marks import MARK_EVERY

from .baselines import BASELINES, largest_score
from .harm import harm, onset
from .recipes import Recipe
from .record import Record

TIERS = ("warning", "error")  # an error counts as a warning too


@dataclass(frozen=True)
class Verdict:
    """How a run was judged, and what became of it.

    first: tier to the step of its first issue, None for none. alarms: tier to how often it began to fire.
    kinds: "severity: type" to the first step. baselines: name to the step of the first alarm.
    """

    recipe: Recipe
    harm: float
    onset: int | None
    last: int
    first: dict[str, int | None]
    alarms: dict[str, int]
    kinds: dict[str, int]
    baselines: dict[str, int | None] = field(default_factory=dict)
    largest_score: float = 0.0

    def lead(self, tier: str) -> int | None:
        """Steps from the first issue of that tier to the onset of harm."""
        step = self.first[tier]
        return None if step is None or self.onset is None else self.onset - step


def diagnoses(
    record: Record, thresholds: Mapping[str, float] | None = None, every: int | None = None
) -> Iterator[AttentionDiagnosis]:
    """One diagnosis for each reading; every: as for `Record.history`."""
    history = []
    # A monitor takes marks where it is read seldom.
    watch = Watch() if every is not None and every >= 2 * MARK_EVERY else None
    for snapshot in record.history(every, watch):
        history.append(snapshot)
        yield diagnose(history, thresholds=thresholds)


def judged(
    record: Record,
    thresholds: Mapping[str, float] | None = None,
    every: int | None = None,
    baselines: bool = False,
) -> Verdict:
    """The verdict over a whole run."""
    first: dict[str, int | None] = dict.fromkeys(TIERS)
    alarms, fired, kinds = dict.fromkeys(TIERS, 0), dict.fromkeys(TIERS, False), {}
    for diagnosis in diagnoses(record, thresholds, every):
        for issue in diagnosis.issues:
            kinds.setdefault(f"{issue.severity}: {issue.issue_type}", diagnosis.step)
        now = {"warning": diagnosis.has_issues(), "error": bool(diagnosis.errors)}
        for tier in TIERS:
            if now[tier] and first[tier] is None:
                first[tier] = diagnosis.step
            alarms[tier] += now[tier] and not fired[tier]
            fired[tier] = now[tier]
    history = list(record.history(every)) if baselines else []
    steps = {name: alarm(record, history) for name, alarm in BASELINES.items()} if baselines else {}
    return Verdict(
        record.recipe,
        harm(record),
        onset(record),
        len(record.losses),
        first,
        alarms,
        kinds,
        steps,
        largest_score(history) if baselines else 0.0,
    )
