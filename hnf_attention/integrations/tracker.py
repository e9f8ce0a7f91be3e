"""What all writers for trackers share: what a snapshot sends, and the thread that sends it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from ..diagnosis import AttentionDiagnosis, StabilityIssue
from ..monitoring.transitions import IssueTracker
from ..names import display_name
from .background import PATIENCE, Background
from .series import LayerKeys, heatmaps, histograms, kinds, scalars

#: A snapshot that a service does not take is tried so often: for about two minutes.
ATTEMPTS = 8
HEATMAP_CAPTION = "layers from 0 downwards, heads to the right; dark is low, grey not measured"
COLUMNS = (
    "step",
    "severity",
    "issue",
    "layer",
    "head",
    "value",
    "threshold",
    "evidence",
    "suggestion",
    "source",
)
_Run = TypeVar("_Run")


@dataclass(frozen=True, eq=False)
class Page:
    """What one snapshot sends, under the names of `series`.

    layers: keys to names, None where a run knows them already. issues: the table, whose columns are COLUMNS; None
    where the issues are those of the snapshot before. alerts: errors and warnings that are new or worse, and those of
    snapshots before that could not be sent.
    """

    diagnosis: AttentionDiagnosis
    layers: dict[str, str] | None
    scalars: dict[str, float]
    histograms: dict[str, np.ndarray]
    heatmaps: dict[str, np.ndarray]
    issues: list[list[Any]] | None
    alerts: list[StabilityIssue]


class TrackerWriter(Generic[_Run]):
    """Sends each snapshot to a run of a tracker, from a thread of its own.

    `write` hands a snapshot over and returns. A service that is slow or away costs no training step: one line is
    logged, snapshots wait, and those that are too many or too old are dropped.

    A subclass says what a run is: `_active` and `_start` find one, `_begin` prepares it, `_send` logs, `_finish` ends
    one that `_start` made. All but `_active` are called on the thread.
    """

    def __init__(self, given: _Run | None) -> None:
        self._given = given
        self._own: _Run | None = None  # the run that was started here
        self._latest: _Run | None = None  # the run that the last snapshot went to
        self._keys = LayerKeys()
        self._layers_told = 0
        self._kinds: frozenset = frozenset()  # `kinds` of the diagnosis before
        self._issues = IssueTracker()
        self._alerts: list[StabilityIssue] = []
        self._background = Background(type(self).__name__, "snapshots", ATTEMPTS)

    def write(self, diagnosis: AttentionDiagnosis) -> None:
        """Take a diagnosis in. Raises nothing: the thread says what goes wrong."""
        active, news_read = self._active(), threading.Event()

        def job() -> None:
            if not news_read.is_set():  # else this is another attempt
                news_read.set()
                news = self._issues.update(diagnosis.issues, judged=not diagnosis.not_judged)
                self._alerts += [x for x in (*news.new, *news.worse) if x.severity != "note"]
            self._write(diagnosis, active)

        self._background.put(job)

    def flush(self, timeout: float = PATIENCE) -> bool:
        """Wait until all that was taken is sent or dropped. Returns whether nothing waits any more."""
        return self._background.flush(timeout)

    def close(self) -> None:
        """Send what waits, and finish the run if it was started here; a later snapshot starts another one."""
        self._background.put(self._end)
        self._background.close()

    def _write(self, diagnosis: AttentionDiagnosis, active: _Run | None) -> None:
        run = next((run for run in (self._given, self._own, active) if run is not None), None)
        if run is None:
            run = self._own = self._start()
        if run != self._latest:
            self._begin(run)
            self._latest, self._layers_told, self._kinds = run, 0, frozenset()
        self._keys.add(diagnosis.stats)
        found = kinds(diagnosis)
        page = Page(
            diagnosis,
            None if len(self._keys) == self._layers_told else self._names(),
            scalars(diagnosis, self._keys),
            histograms(diagnosis, self._keys),
            heatmaps(diagnosis, self._keys),
            None if found == self._kinds else table(diagnosis),
            list(self._alerts),
        )
        self._send(run, page)
        self._layers_told, self._kinds = len(self._keys), found
        self._alerts.clear()

    def _names(self) -> dict[str, str]:
        return {key: display_name(layer) for key, layer in self._keys.names().items()}

    def _end(self) -> None:
        own, self._own = self._own, None
        if own is not None:
            self._finish(own)

    def _active(self) -> _Run | None:
        """The run that the script has open, on the script's thread."""
        return None

    def _start(self) -> _Run:
        """A run of the writer's own."""
        raise NotImplementedError

    def _begin(self, run: _Run) -> None:
        """The snapshots that follow go to this run."""

    def _send(self, run: _Run, page: Page) -> None:
        """Log a snapshot."""
        raise NotImplementedError

    def _finish(self, run: _Run) -> None:
        """End a run of the writer's own."""
        raise NotImplementedError


def table(diagnosis: AttentionDiagnosis) -> list[list[Any]]:
    """A row for each issue; `COLUMNS` names the columns."""
    return [
        [
            diagnosis.step,
            issue.severity,
            issue.issue_type,
            display_name(issue.layer),
            issue.head,
            float(issue.value),
            float(issue.threshold),
            issue.evidence,
            issue.suggestion,
            issue.source,
        ]
        for issue in diagnosis.issues
    ]


def check_options(given: object | None, options: Mapping[str, Any]) -> None:
    """Raise TypeError for options that start a run beside a run that is given."""
    if given is not None and options:
        raise TypeError(f"expected a run, or options to start one, got a run and {sorted(options)}")
