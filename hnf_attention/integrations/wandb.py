"""Snapshots in Weights & Biases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .alert_text import body, subject
from .extras import require
from .series import PREFIX
from .tracker import COLUMNS, HEATMAP_CAPTION, Page, TrackerWriter, check_options

if TYPE_CHECKING:
    import wandb

_STEP = f"{PREFIX}/step"


class WandbWriter(TrackerWriter["wandb.Run"]):
    """Logs each snapshot to a run: scalars, histograms over heads, heatmaps of all heads, a table of issues, alerts.

    run: the run to log to. None takes the one that is active at a snapshot, such as the trainer's own.
        If there is none, `wandb.init(**options)` starts one, which `close()` finishes. For instance
        `WandbWriter(project="pretraining", mode="offline")` needs no network.
    alerts: send an alert for errors and warnings that are new or worse. W&B mails it or posts it to Slack, as
        the user's settings there say.

    All series are drawn over `attn/step`, the training step, whatever the run's own step counter says. Every
    snapshot raises that counter by one. A script that passes `step=` to `wandb.log` has to count at least as
    fast. Layers are numbered in the order they ran, `attn/layer_03/...`; `attn_layers` in the run's config says
    which is which. `attn/issues` is logged whenever the issues changed. Snapshots are sent from a thread: end the
    monitor, or call `flush()`, before you finish a run of your own.

    Raises ImportError if wandb is not installed, TypeError for options beside a run. If wandb starts no run, above
    all for want of a login, one line is logged.
    """

    def __init__(self, run: wandb.Run | None = None, *, alerts: bool = True, **options: Any):
        self._module = require("wandb", "wandb")
        check_options(run, options)
        super().__init__(run)
        self._options, self._sends_alerts = options, alerts

    def _active(self) -> wandb.Run | None:
        return self._module.run

    def _start(self) -> wandb.Run:
        try:
            return self._module.init(**self._options)
        except self._module.errors.UsageError as error:
            raise InputError(
                f"Weights & Biases starts no run: {error}; run `wandb login`, give WandbWriter the run to log to, "
                'or make it WandbWriter(mode="offline")'
            ) from None

    def _begin(self, run: wandb.Run) -> None:
        run.define_metric(_STEP)
        run.define_metric(f"{PREFIX}/*", step_metric=_STEP)

    def _send(self, run: wandb.Run, page: Page) -> None:
        if page.layers is not None:  # a resumed run has them
            run.config.update({f"{PREFIX}_layers": page.layers}, allow_val_change=True)
        data: dict[str, Any] = {_STEP: page.diagnosis.step} | page.scalars
        for name, values in page.histograms.items():
            data[name] = self._module.Histogram(values)
        for name, pixels in page.heatmaps.items():
            data[name] = self._module.Image(pixels, caption=HEATMAP_CAPTION)
        if page.issues is not None:  # each table is a file of its own, and a version of an artifact
            data[f"{PREFIX}/issues"] = self._module.Table(list(COLUMNS), page.issues)
        run.log(data)
        if page.alerts and self._sends_alerts:
            worst = "ERROR" if any(issue.severity == "error" for issue in page.alerts) else "WARN"
            level = getattr(self._module.AlertLevel, worst)
            run.alert(subject(page.alerts), f"step {page.diagnosis.step}\n{body(page.alerts)}", level=level)

    def _finish(self, run: wandb.Run) -> None:
        run.finish()
