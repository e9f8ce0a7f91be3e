"""Snapshots in MLflow."""

from __future__ import annotations

import csv
import io
import time
from typing import TYPE_CHECKING, Any

from .alert_text import subject
from .extras import require
from .series import PREFIX
from .tracker import COLUMNS, Page, TrackerWriter, check_options

if TYPE_CHECKING:
    from mlflow.entities import Run

_BATCH = 1000  # metrics that MLflow takes at once


class MLflowWriter(TrackerWriter[str]):
    """Logs each snapshot to a run: metrics, heatmaps of all heads, a table of issues.

    run: the run to log to, or its id. None takes the one that is active on the training thread at a snapshot, such as
        the trainer's own. If there is none, `mlflow.start_run(**options)` starts one, which `close()` ends.
    MLflow's tracking URI and experiment are those of the process, as `mlflow.set_tracking_uri` and
    `mlflow.set_experiment` set them.

    Layers are numbered in the order they ran, `attn/layer_03/...`; the artifact `attn/layers.json` says which is which.
    `attn/issues/step_....csv` is written whenever the issues changed, and so is the run's tag `attn.verdict`, such as
    "Attention: 2 errors, 1 warning". MLflow has no alerts: give the monitor `on_alert`.

    Raises ImportError if mlflow is not installed, TypeError for options beside a run.
    """

    def __init__(self, run: Run | str | None = None, **options: Any):
        self._module = require("mlflow", "mlflow")
        check_options(run, options)
        super().__init__(run if run is None or isinstance(run, str) else run.info.run_id)
        self._options = options

    def _active(self) -> str | None:
        run = self._module.active_run()  # of this thread
        return None if run is None else run.info.run_id

    def _start(self) -> str:
        return self._module.start_run(**self._options).info.run_id

    def _send(self, run: str, page: Page) -> None:
        client, step = self._module.MlflowClient(), page.diagnosis.step
        if page.layers is not None:
            client.log_dict(run, page.layers, f"{PREFIX}/layers.json")
        now, metric = int(time.time() * 1000), self._module.entities.Metric
        metrics = [metric(name, value, now, step) for name, value in page.scalars.items()]
        for start in range(0, len(metrics), _BATCH):
            client.log_batch(run, metrics[start : start + _BATCH])
        for name, pixels in page.heatmaps.items():
            client.log_image(run, pixels, key=name, step=step)
        if page.issues is not None:
            client.log_text(run, _csv(page.issues), f"{PREFIX}/issues/step_{step:08d}.csv")
            client.set_tag(run, f"{PREFIX}.verdict", subject(page.diagnosis.issues))

    def _finish(self, run: str) -> None:
        self._module.end_run()  # of the thread, which started it


def _csv(rows: list[list[Any]]) -> str:
    """A table that MLflow's page shows as one."""
    text = io.StringIO()
    csv.writer(text).writerows([COLUMNS, *rows])
    return text.getvalue()
