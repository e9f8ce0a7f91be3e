"""What a report needs of a run, from a run log or from a diagnosis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...diagnosis import AttentionDiagnosis
from ...diagnosis.thresholds import differing
from ...errors import InputError
from ...run_log import RunLog
from ...run_log.metrics import NAMES, joined, table
from ...run_log.reader import Event
from ...run_log.records import Layout, issue_dict

#: Log steps of a page. Those of a longer run are joined to so many, extremes kept.
MOST_STEPS = 1000
#: Values of all statistics of a page. Three statistics of 126 x 128 heads at 1,000 log steps are below.
MOST_VALUES = 50_000_000
_FEWEST_METRICS = 3
#: Numbers that a page is made from, past which a file is refused: no model is so large.
LARGEST = 5 * MOST_VALUES
#: What a page shows if nothing else is asked for, the most telling first.
DEFAULT_METRICS = (
    "logit_range_max",
    "normalized_entropy",
    "required_bits",
    "max_weight",
    "sink_mass",
    "saturated_share",
    "jacobian_trace_bound",
    "between_logit_range",
    "query_norm",
    "key_norm",
    "error_bound",
    "nonfinite_rows",
)
_OF_MARKS = ("nonfinite_rows", "sink_mass", "judged_rows")


@dataclass(frozen=True)
class Run:
    """One run. values: statistic to float32 (steps, heads of all layers); NaN where there is no number.

    layers: name to (heads, what the layer is) in the order of the heads. steps: rising. not_measured: layer to reason.
    sessions: what the processes that wrote said of themselves. joined: whether log steps were joined.
    training: whether the model trained at the last log step. thresholds: what the run was judged with in place of the
    table's numbers; where they changed meanwhile, the latest.
    """

    name: str
    steps: list[int]
    layers: dict[str, tuple[int, dict[str, Any]]]
    values: dict[str, np.ndarray]
    events: list[Event] = field(default_factory=list)
    scalars: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    not_measured: dict[str, str] = field(default_factory=dict)
    sessions: list[dict[str, Any]] = field(default_factory=list)
    joined: bool = False
    training: bool = True
    thresholds: Mapping[str, float] = field(default_factory=dict)

    @property
    def heads(self) -> int:
        """Of all layers."""
        return sum(count for count, _ in self.layers.values())


def chosen_metrics(metrics: Sequence[str] | None, steps: int, heads: int, runs: int) -> list[str]:
    """The statistics that a page holds: those asked for, or as many as fit. Raises InputError for an unknown one."""
    if metrics is not None:
        unknown = [name for name in metrics if name not in NAMES]
        if unknown or not metrics:
            raise InputError(f"expected metrics among {', '.join(NAMES)}; got {', '.join(unknown) or 'none'}")
        return list(dict.fromkeys(metrics))
    room = MOST_VALUES // max(min(steps, MOST_STEPS) * heads * runs, 1)
    return list(DEFAULT_METRICS[: max(_FEWEST_METRICS, room)])


def of_log(log: RunLog, metrics: Sequence[str]) -> Run:
    """The run of a run log. Raises InputError if it holds no log step."""
    steps = log.steps.tolist()
    if not steps:
        raise InputError(f"expected a run log with at least one log step, got none: {log.path}")
    counts = log.layers
    described: dict[str, dict[str, Any]] = {}
    starts = dict(zip(counts, np.cumsum([0, *counts.values()]).tolist()))
    training = True

    def tables() -> Iterator[tuple[int, np.ndarray]]:
        nonlocal training
        placed: dict[Layout, np.ndarray] = {}
        for record in log.records():
            if record.step > steps[-1]:  # written since, perhaps with layers that are not in `counts`
                return
            training = record.training
            if record.layout not in placed:
                placed[record.layout] = _columns(record.layout, starts)
                described.update(_described(record.layout))
            yield (
                record.step,
                _rows(record.layout, record.table, placed[record.layout], names, sum(counts.values())),
            )

    names = list(dict.fromkeys((*metrics, *_OF_MARKS)))
    kept, values = _collect(tables(), len(steps), names, sum(counts.values()))
    return Run(
        log.path.name,
        kept,
        {name: (count, described.get(name, {})) for name, count in counts.items()},
        values,
        log.events,
        log.scalars(),
        log.not_measured,
        log.sessions,
        len(kept) < len(steps),
        training,
        log.thresholds,
    )


def of_diagnosis(diagnosis: AttentionDiagnosis, metrics: Sequence[str]) -> Run:
    """The log steps that a diagnosis looks back on; its issues are those of its last step."""
    snapshots = [(snapshot.step, snapshot.layers) for snapshot in diagnosis.history]
    snapshots = snapshots or [(diagnosis.step, diagnosis.stats)]
    layers: dict[str, tuple[int, dict[str, Any]]] = {}
    for _, stats in snapshots:
        layout = Layout.of(stats)
        for name, about in _described(layout).items():
            layers[name] = max(stats[name].num_heads, layers.get(name, (0, {}))[0]), about
    heads = sum(count for count, _ in layers.values())
    starts = dict(zip(layers, np.cumsum([0, *(count for count, _ in layers.values())]).tolist()))
    names = list(dict.fromkeys((*metrics, *_OF_MARKS)))
    made = (
        (step, _rows(layout, table(stats), _columns(layout, starts), names, heads))
        for step, stats in snapshots
        for layout in [Layout.of(stats)]
    )
    kept, values = _collect(made, len(snapshots), names, heads)
    issues = [Event(diagnosis.step, "issue", "new", issue_dict(issue)) for issue in diagnosis.issues]
    last = diagnosis.history[-1] if diagnosis.history else None
    return Run(
        f"diagnosis of step {diagnosis.step}",
        kept,
        layers,
        values,
        issues,
        not_measured=dict(diagnosis.not_measured),
        joined=len(kept) < len(snapshots),
        training=last is None or last.training,
        thresholds=differing(diagnosis.thresholds),
    )


def _described(layout: Layout) -> dict[str, dict[str, Any]]:
    return {
        name: {"head_dim": dim, "dtype": dtype, "sample_period": period}
        for name, _, dim, dtype, period in layout.layers
    }


def _columns(layout: Layout, starts: Mapping[str, int]) -> np.ndarray:
    """Where the columns of a block lie in a table of all layers."""
    return np.concatenate([
        np.arange(starts[name], starts[name] + heads) for name, heads, *_ in layout.layers
    ] or [np.zeros(0, int)]).astype(int)  # fmt: skip


def _rows(
    layout: Layout, block: np.ndarray, columns: np.ndarray, names: Sequence[str], heads: int
) -> np.ndarray:
    """The rows of these statistics, float32 (len(names), heads)."""
    rows = np.full((len(names), heads), np.nan, np.float32)
    for row, name in zip(rows, names):
        if name in layout.metrics:
            row[columns] = block[layout.metrics.index(name)]
    return rows


def _collect(
    tables: Iterator[tuple[int, np.ndarray]], count: int, names: list[str], heads: int
) -> tuple[list[int], dict[str, np.ndarray]]:
    """Tables of `count` log steps as at most MOST_STEPS ones: neighbours are joined."""
    together = -(-count // MOST_STEPS)
    room = -(-count // together)
    if room * heads * len(names) > LARGEST:
        raise InputError(
            f"expected a page of at most {LARGEST:,} numbers, got {len(names)} statistics of {heads:,} heads at "
            f"{room:,} log steps"
        )
    values = {name: np.full((room, heads), np.nan, np.float32) for name in names}
    steps: list[int] = []
    for number, (step, rows) in enumerate(tables):
        place, more = divmod(number, together)
        if place >= room:  # written since they were counted
            break
        if more:
            before = np.stack([values[name][place] for name in names])
            rows = joined(names, before, rows)
            steps[place] = step
        else:
            steps.append(step)
        for name, row in zip(names, rows):
            values[name][place] = row
    return steps, {name: found[: len(steps)] for name, found in values.items()}
