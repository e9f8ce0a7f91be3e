"""A run log as text for a terminal: every head as a cell, its history as a line, and what happened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from ..diagnosis.issue import SEVERITIES, number_text
from ..names import display_name
from ..run_log import RunLog
from ..run_log.metrics import Metric
from ..run_log.reader import Event, record_values
from ..run_log.records import printable

LEVELS = "▁▂▃▄▅▆▇█"
_NOT_FINITE, _NONE = "×", " "
# matplotlib's viridis in as many colours: it keeps its order in grey and for the colour-blind.
_COLOURS = ("#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725")
_SEVERITY_STYLE = {"error": "bold red", "warning": "yellow", "note": "dim"}
_EVENTS, _ROWS = 8, 24  # events, and rows of cells where nothing limits them
_CELL = 3  # columns of a head's cell, at most


class _Scale(NamedTuple):
    """From a number to a level. logarithmic: where the numbers span more than a factor of 20."""

    low: float
    high: float
    logarithmic: bool

    @staticmethod
    def of(values: np.ndarray) -> _Scale | None:
        """That of these numbers; None if none of them is finite."""
        finite = values[np.isfinite(values)]
        if not finite.size:
            return None
        low, high = float(finite.min()), float(finite.max())
        return _Scale(low, high, bool(low > 0 and high > 20 * low))

    def level(self, value: float) -> int:
        """0 to 7."""
        low, high = self.low, self.high
        if self.logarithmic:
            value, low, high = (float(np.log(max(x, 1e-30))) for x in (value, low, high))
        share = 0.5 if high <= low else (value - low) / (high - low)
        return int(np.clip(share, 0, 1) * (len(LEVELS) - 1) + 0.5)


class Watched:
    """What was read of a run log so far. metric: what the cells show."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.name = ""
        self.latest: dict[str, np.ndarray] = {}  # of each layer, a number per head
        self.steps: list[int] = []
        self.worst: list[float] = []  # of all heads, by log step
        self.loss = np.empty(0)
        self.events: list[Event] = []
        self.issues: list[dict] = []
        self.missed: dict[str, str] = {}
        self._written = 0.0  # when the last of the steps was

    def update(self, log: RunLog) -> None:
        """Read what was written since the last time."""
        log.refresh()
        self.name = str(log.path)
        records = log.records()
        if self.steps:
            records = log.records(after=self.steps[-1] - 1)
            again = next(records, None)
            if again is None or (again.step, again.time) != (self.steps[-1], self._written):
                # The run was resumed from an earlier step, and does these again.
                self.steps.clear()
                self.worst.clear()
                records = log.records()
        for record in records:
            self._written = record.time
            self.latest = record_values(record, self.metric.name)
            values = np.concatenate([*self.latest.values(), np.empty(0, np.float32)])
            finite = values[np.isfinite(values)]
            extreme = np.min if self.metric.low_is_bad else np.max
            self.steps.append(record.step)
            self.worst.append(float(extreme(finite)) if finite.size else np.nan)
        self.loss = log.scalars().get("loss", (None, np.empty(0)))[1]
        self.events, self.issues, self.missed = log.events, log.issues, log.not_measured

    @property
    def verdict(self) -> str:
        """How many issues of each severity there are, in words."""
        if not self.steps:
            return "no log step yet"
        count = Counter(str(issue.get("severity")) for issue in self.issues)
        found = [f"{count[x]} {x}{'s' * (count[x] > 1)}" for x in SEVERITIES if count[x]]
        return ", ".join(found) or "no issues"


def view(watched: Watched, width: int, height: int | None) -> RenderableType:
    """The state in so many columns and rows; None for as many rows as it takes."""
    lines = [_headline(watched, width)]
    if not watched.steps:
        return Group(*lines)
    label = 12
    lines += [_history(name, values, width, label) for name, values in _histories(watched)]
    events = _together([x for x in watched.events if x.kind == "issue" or x.change is None])
    few = min(len(events), _EVENTS)
    room = _ROWS if height is None else max(1, height - len(lines) - few - 3)
    lines.append(_legend(watched, width))
    lines += _cells(watched, width, label, room)
    left = _EVENTS if height is None else max(few, height - len(lines) - 2)
    labels = dict(zip(watched.latest, _short(list(watched.latest))))
    lines += [_event(event, width, labels) for event in events[-left:]]
    if watched.missed:
        names = ", ".join(display_name(name) for name in watched.missed)
        lines.append(_line(f"not measured: {names}", width, "yellow"))
    return Group(*lines)


def _headline(watched: Watched, width: int) -> Text:
    text = Text()
    if watched.steps:
        heads = sum(len(values) for values in watched.latest.values())
        text.append(f"step {watched.steps[-1]}, {len(watched.latest)} layers, {heads} heads: ", style="bold")
    worst = next((str(x.get("severity")) for x in watched.issues), "")
    text.append(watched.verdict, style=_SEVERITY_STYLE.get(worst, "green"))
    text.append(f"  {printable(watched.name)}", style="dim")
    text.truncate(width, overflow="ellipsis")
    return text


def _histories(watched: Watched) -> list[tuple[str, np.ndarray]]:
    histories = [("worst head", np.array(watched.worst))]
    return histories + ([("loss", watched.loss)] if len(watched.loss) else [])


def _history(name: str, values: np.ndarray, width: int, label: int) -> Text:
    """A sparkline with its last number. Where there are more numbers than columns, each column is the mean of some."""
    columns = max(1, min(len(values), width - label - 12))
    parts = np.array_split(values, columns)
    means = np.array(
        [part[np.isfinite(part)].mean() if np.isfinite(part).any() else np.nan for part in parts]
    )
    scale = _Scale.of(means)
    text = Text(f"{name:<{label}}")
    for mean in means:
        text.append(*_cell(mean, scale))
    return text.append(f" {values[-1]:.4g}")


def _legend(watched: Watched, width: int) -> Text:
    metric, scale = watched.metric, _Scale.of(np.concatenate([*watched.latest.values(), np.empty(0)]))
    unit = f" {metric.unit}" if metric.unit else ""
    text = Text(f"{metric.label}: ")
    if scale is None:
        text.append("no number")
    elif scale.low == scale.high:
        text.append(*_cell(scale.low, scale)).append(f" {scale.low:.4g}{unit}")
    else:
        text.append(*_cell(scale.low, scale)).append(f" {scale.low:.4g} to ")
        text.append(*_cell(scale.high, scale)).append(f" {scale.high:.4g}{unit}")
        text.append(", log scale" if scale.logarithmic else "")
    text.truncate(width, overflow="ellipsis")
    return text


def _cells(watched: Watched, width: int, label: int, room: int) -> list[Text]:
    """A row for each layer, or for as many layers as share one where there is no room; the worst head speaks."""
    names = list(watched.latest)
    most = max((len(values) for values in watched.latest.values()), default=0)
    if most == 0:
        return []
    table = np.full((len(names), most), np.nan)
    for row, values in zip(table, watched.latest.values()):
        row[: len(values)] = values
    present = np.zeros(table.shape, bool)
    for row, values in zip(present, watched.latest.values()):
        row[: len(values)] = True
    scale = _Scale.of(table)
    rows = np.array_split(np.arange(len(names)), min(len(names), room))
    columns = np.array_split(np.arange(most), min(most, max(1, width - label)))
    wide = min(_CELL, max(1, (width - label) // len(columns)))
    short, lines = _short(names), []
    for row in rows:
        text = Text(f"{_row_name(short, row, label)}")
        for column in columns:
            there = present[np.ix_(row, column)]
            values = table[np.ix_(row, column)][there]
            cell, style = _cell(_worst(values, watched.metric), scale) if there.any() else (_NONE, "")
            text.append(cell * wide, style)
        lines.append(text)
    return lines


def _short(names: list[str]) -> list[str]:
    """The names without the parts that all of them begin or end with: '9' of 'model.layers.9.self_attn'."""
    parts = [display_name(name).split(".") for name in names]
    if len(parts) < 2:
        return [".".join(part) for part in parts]
    least = min(map(len, parts)) - 1
    start = next((i for i in range(least) if len({part[i] for part in parts}) > 1), least)
    end = next((i for i in range(least - start) if len({part[-1 - i] for part in parts}) > 1), least - start)
    return [".".join(part[start : len(part) - end]) for part in parts]


def _row_name(names: list[str], row: np.ndarray, label: int) -> str:
    first, last = (printable(names[index]) for index in (row[0], row[-1]))
    text = first if len(row) == 1 else f"{first} to {last}"
    short = text if len(text) < label else f"…{text[-label + 2 :]}"
    return f"{short:<{label}}"


def _worst(values: np.ndarray, metric: Metric) -> float:
    """NaN if one is not finite."""
    if not np.isfinite(values).all():
        return float("nan")
    return float(values.min() if metric.low_is_bad else values.max())


def _cell(value: float, scale: _Scale | None) -> tuple[str, str]:
    """A character and its style. Its height says what its colour says."""
    if scale is None or not np.isfinite(value):
        return _NOT_FINITE, "bold red"
    level = scale.level(value)
    return LEVELS[level], _COLOURS[level]


def _together(events: Sequence[Event]) -> list[list[Event]]:
    """Events in their order; the heads of a layer whose issue changed in the same way at one step are one group."""

    def kind(event: Event) -> tuple[object, ...]:
        own = id(event) if event.kind != "issue" else None
        parts = (event.detail.get(name) for name in ("severity", "issue_type", "layer"))
        return event.step, event.change, own, *map(str, parts)

    groups: dict[tuple[object, ...], list[Event]] = {}
    for event in events:
        groups.setdefault(kind(event), []).append(event)
    return list(groups.values())


def _event(group: Sequence[Event], width: int, labels: Mapping[str, str]) -> Text:
    event, detail = group[0], group[0].detail
    if event.kind == "issue":
        name = str(detail.get("layer"))
        label = labels.get(name, display_name(name))
        heads = (each.detail.get("head") for each in group)
        place = f"{'layer ' * label.isdigit()}{label}{number_text(x for x in heads if isinstance(x, int))}"
        text = str(detail.get("headline")).partition(": ")[2] or str(detail.get("headline"))
        what = f"{event.change} {detail.get('severity')}: {place}: {text}"
        style = "green" if event.change == "gone" else _SEVERITY_STYLE.get(str(detail.get("severity")), "")
    else:
        rest = ", ".join(f"{name} {value}" for name, value in detail.items() if name not in ("kind", "step"))
        what, style = f"{event.kind}: {rest}", "cyan"
    return _line(f"{event.step:>8}  {what}", width, style)


def _line(text: str, width: int, style: str) -> Text:
    line = Text(printable(text).replace("\n", " "), style=style)
    line.truncate(width, overflow="ellipsis")
    return line
