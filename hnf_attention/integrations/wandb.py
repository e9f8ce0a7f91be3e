"""Snapshots in Weights & Biases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..diagnosis import AttentionDiagnosis
from ..errors import InputError
from ..names import display_name
from .extras import require
from .series import PREFIX, LayerKeys, heatmaps, histograms, kinds, scalars

if TYPE_CHECKING:
    import wandb

_STEP = f"{PREFIX}/step"
_COLUMNS = (
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


class WandbWriter:
    """Logs each snapshot to a run: scalars, histograms over heads, heatmaps of all heads, a table of issues.

    run: the run to log to. None takes the one that is active at the first snapshot, such as the trainer's own.
        If there is none, `wandb.init(**options)` starts one, which `close()` finishes. For instance
        `WandbWriter(project="pretraining", mode="offline")` needs no network.

    All series are drawn over `attn/step`, the training step, whatever the run's own step counter says. Every
    snapshot raises that counter by one. A script that passes `step=` to `wandb.log` has to count at least as
    fast. Layers are numbered in the order they ran, `attn/layer_03/...`; `attn_layers` in the run's config says
    which is which. `attn/issues` is logged whenever the issues changed.

    Raises ImportError if wandb is not installed, TypeError for options beside a run. The first snapshot raises
    InputError if wandb starts no run, above all for want of a login; its message is one line.
    """

    def __init__(self, run: wandb.Run | None = None, **options: Any):
        self._module = require("wandb", "wandb")
        if run is not None and options:
            raise TypeError(f"expected a run, or options to start one, got a run and {sorted(options)}")
        self._run, self._options = run, options
        self._prepared: wandb.Run | None = None  # the run whose metrics are defined
        self._own: wandb.Run | None = None  # the run that was started here
        self._keys = LayerKeys()
        self._issues: frozenset = frozenset()  # `kinds` of the diagnosis before

    def write(self, diagnosis: AttentionDiagnosis) -> None:
        """Log a diagnosis."""
        run = self._current()
        if self._keys.add(diagnosis.stats):
            names = {key: display_name(layer) for key, layer in self._keys.names().items()}
            run.config.update({f"{PREFIX}_layers": names}, allow_val_change=True)  # a resumed run has them
        data: dict[str, Any] = {_STEP: diagnosis.step} | scalars(diagnosis, self._keys)
        for name, values in histograms(diagnosis, self._keys).items():
            data[name] = self._module.Histogram(values)
        caption = "layers from 0 downwards, heads to the right; dark is low, grey not measured"
        for name, pixels in heatmaps(diagnosis, self._keys).items():
            data[name] = self._module.Image(pixels, caption=caption)
        issues = kinds(diagnosis)
        if issues != self._issues:  # each table is a file of its own, and a version of an artifact
            data[f"{PREFIX}/issues"] = self._module.Table(list(_COLUMNS), _rows(diagnosis))
            self._issues = issues
        run.log(data)

    def close(self) -> None:
        """Finish the run if it was started here; a later snapshot starts another one."""
        if self._own is not None:
            self._own.finish()
            self._own = None

    def _current(self) -> wandb.Run:
        candidates = (self._run, self._own, self._module.run)
        run: wandb.Run | None = next((run for run in candidates if run is not None), None)
        if run is None:
            run = self._own = self._start()
        if run is not self._prepared:
            run.define_metric(_STEP)
            run.define_metric(f"{PREFIX}/*", step_metric=_STEP)
            self._prepared, self._keys, self._issues = run, LayerKeys(), frozenset()
        return run

    def _start(self) -> wandb.Run:
        try:
            return self._module.init(**self._options)
        except self._module.errors.UsageError as error:
            raise InputError(
                f"Weights & Biases starts no run: {error}; run `wandb login`, give WandbWriter the run to log to, "
                'or make it WandbWriter(mode="offline")'
            ) from None


def _rows(diagnosis: AttentionDiagnosis) -> list[list[Any]]:
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
