"""Snapshots in trackio."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .alert_text import body, subject
from .extras import require
from .series import PREFIX
from .tracker import COLUMNS, HEATMAP_CAPTION, Page, TrackerWriter, check_options

if TYPE_CHECKING:
    from trackio import Run

_PROJECT = "attention"


class TrackioWriter(TrackerWriter["Run"]):
    """Logs each snapshot to a run: scalars, histograms over heads, heatmaps of all heads, a table of issues, alerts.

    run: the run to log to. None takes the one that is active at a snapshot, such as the trainer's own. If there is
        none, `trackio.init(**options)` starts one, in the project "attention" unless `project=` says otherwise;
        `close()` finishes it.
    alerts: send an alert for errors and warnings that are new or worse. trackio posts it to the run's `webhook_url`.

    The step is the training step. Layers are numbered in the order they ran, `attn/layer_03/...`; the table
    `attn/layers` says which is which. `attn/issues` is logged whenever the issues changed.
    Snapshots are sent from a thread: end the monitor, or call `flush()`, before you finish a run of your own.

    Raises ImportError if trackio is not installed, TypeError for options beside a run.
    """

    def __init__(self, run: Run | None = None, *, alerts: bool = True, **options: Any):
        self._module = require("trackio", "trackio")
        check_options(run, options)
        super().__init__(run)
        self._options, self._sends_alerts = {"project": _PROJECT} | options, alerts

    def _active(self) -> Run | None:
        return self._module.context_vars.current_run.get()  # of this thread

    def _start(self) -> Run:
        return self._module.init(**self._options)

    def _send(self, run: Run, page: Page) -> None:
        module, data = self._module, dict[str, Any](page.scalars)
        if page.layers is not None:
            data[f"{PREFIX}/layers"] = module.Table(["key", "layer"], [[*row] for row in page.layers.items()])
        for name, values in page.histograms.items():
            data[name] = module.Histogram(values)
        for name, pixels in page.heatmaps.items():
            data[name] = module.Image(pixels, caption=HEATMAP_CAPTION)
        if page.issues:  # trackio has no empty table; `attn/errors` and `attn/warnings` are 0 then
            data[f"{PREFIX}/issues"] = module.Table(list(COLUMNS), page.issues)
        run.log(data, step=page.diagnosis.step)
        if page.alerts and self._sends_alerts:
            worst = "ERROR" if any(issue.severity == "error" for issue in page.alerts) else "WARN"
            level = getattr(module.AlertLevel, worst)
            run.alert(subject(page.alerts), body(page.alerts), level=level, step=page.diagnosis.step)

    def _finish(self, run: Run) -> None:
        run.finish()
