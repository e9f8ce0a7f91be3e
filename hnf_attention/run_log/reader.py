"""Reads a run log, also while it is written."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import database, fragments
from .blocks import BadLog
from .records import Layout, Record

_MOST_NUMBERS = 1 << 28
_LOG_STEP = (
    "SELECT first_step, time, training, forwards, layout, block, not_measured FROM snapshots WHERE step = ?"
)


class Event(NamedTuple):
    """Something that happened at a log step.

    kind: "issue" or another. change: of an issue, "new", "worse", "better" or "gone"; None for the rest.
    detail: what is known of it, as JSON types.
    """

    step: int
    kind: str
    change: str | None
    detail: dict[str, Any]


class RunLog:
    """What a `RunLogWriter` wrote: `RunLog("run.db")`.

    A file that is written meanwhile is read as of the moment of each call. Fragments of a network file system are
    taken in when the log is opened, and again by `refresh()`.

    Raises BadLog for a file that is no run log, FileNotFoundError if there is neither a file nor fragments.
    """

    def __init__(self, path: str | PathLike[str]):
        self.path = Path(path)
        self._connection: sqlite3.Connection | None = None
        self._sees_more = True  # whether the connection sees what is written later
        self._fragments = not self.path.is_file() and fragments.folder_of(self.path).is_dir()
        self.refresh()

    def __repr__(self) -> str:
        steps = self.steps
        span = f"steps {steps[0]} to {steps[-1]}" if len(steps) else "no step yet"
        return f"RunLog({str(self.path)!r}): {len(steps)} log steps, {span}, {len(self.layers)} layers"

    def refresh(self) -> None:
        """Take in what was written since; only fragments, and a file in a folder that may not be written, need it."""
        if self._fragments:
            if self._connection is None:
                self._connection = database.in_memory()
            fragments.gather(self.path, self._connection)
        elif self._connection is None or not self._sees_more:
            self.close()
            self._connection, self._sees_more = database.connect_to_read(self.path)

    def close(self) -> None:
        """Let go of the file."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        if self._connection is None:
            raise ValueError(f"expected an open run log, got one that was closed: {self.path}")
        try:
            with closing(self._connection.execute(query, values)) as found:
                return found.fetchall()
        except sqlite3.DatabaseError as error:
            raise BadLog(f"expected a whole run log, got one that SQLite cannot read ({error})") from error

    @property
    def steps(self) -> np.ndarray:
        """The log steps, int64, rising."""
        return np.array([row[0] for row in self._rows("SELECT step FROM snapshots ORDER BY step")], np.int64)

    @property
    def layouts(self) -> list[Layout]:
        """What the blocks' rows and columns are, in the order they were first written."""
        return [Layout.parse(text) for (text,) in self._rows("SELECT described FROM layouts ORDER BY id")]

    @property
    def layers(self) -> dict[str, int]:
        """The layers in the order they first ran, with the largest number of heads that each had."""
        found: dict[str, int] = {}
        for layout in self.layouts:
            for name, heads, *_ in layout.layers:
                found[name] = max(found.get(name, 0), heads)
        return found

    @property
    def sessions(self) -> list[dict[str, Any]]:
        """The processes that wrote, oldest first: "started" (seconds of the epoch) and what `about` said."""
        rows = self._rows("SELECT started, about FROM sessions ORDER BY id")
        return [
            {"started": started if isinstance(started, float) else None} | _dict(about)
            for started, about in rows
        ]

    @property
    def events(self) -> list[Event]:
        """Everything that happened, oldest first."""
        found = []
        for step, kind, change, text in self._rows(
            "SELECT step, kind, change, detail FROM events ORDER BY step, id"
        ):
            own = (detail := _dict(text)).get("step")
            try:
                at = int(own if isinstance(own, int) else step)
            except (ValueError, TypeError) as error:
                raise BadLog(f"expected an event at a step, got {error}: {self.path}") from None
            found.append(Event(at, str(kind), None if change is None else str(change), detail))
        return sorted(found, key=lambda event: event.step)

    @property
    def issues(self) -> list[dict[str, Any]]:
        """The issues that are still open at the last log step, each as it was last reported.

        One is open until it was away at three log steps in a row or more.
        """
        if self._connection is None or not len(steps := self.steps):
            return []
        try:
            return database.active_issues(self._connection, int(steps[-1]))
        except (sqlite3.DatabaseError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise BadLog(f"expected a whole run log, got one with {error!r}: {self.path}") from None

    @property
    def thresholds(self) -> dict[str, float]:
        """What the last log step was judged with in place of the table's numbers, by name. An older log has none."""
        if self._connection is None:
            return {}
        try:
            return database.thresholds(self._connection)
        except sqlite3.DatabaseError as error:
            raise BadLog(f"expected a whole run log, got one with {error!r}: {self.path}") from None

    @property
    def not_measured(self) -> dict[str, str]:
        """Attention that was seen and not measured, as of the last log step: layer to reason."""
        rows = self._rows("SELECT not_measured FROM snapshots ORDER BY step DESC LIMIT 1")
        return {str(name): str(why) for name, why in _dict(rows[0][0]).items()} if rows else {}

    def scalars(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Name to (steps int64, values float64), rising by step; NaN where the value was none."""
        found: dict[str, tuple[list[int], list[float]]] = {}
        for name, step, value in self._rows("SELECT name, step, value FROM scalars ORDER BY name, step"):
            steps, values = found.setdefault(name, ([], []))
            steps.append(step)
            values.append(np.nan if value is None else value)
        try:
            return {
                str(name): (np.array(steps, np.int64), np.array(values, np.float64))
                for name, (steps, values) in found.items()
            }
        except (ValueError, TypeError, OverflowError) as error:
            raise BadLog(f"expected numbers of training steps, got {error}: {self.path}") from None

    def records(self, after: int = -1) -> Iterator[Record]:
        """The log steps after a step, one at a time. Changes, events and scalars are not part of them.

        Raises BadLog for a block that does not fit its layout.
        """
        layouts: dict[int, Layout] = {}
        for step in self.steps[self.steps > after].tolist():
            rows = self._rows(_LOG_STEP, step)
            if not rows:  # joined to another one meanwhile
                continue
            first, time, training, forwards, number, block, missed = rows[0]
            if number not in layouts:
                known = self._rows("SELECT described FROM layouts WHERE id = ?", number)
                if not known:
                    raise BadLog(f"expected the layout of log step {step}, got none: {self.path}")
                layouts[number] = Layout.parse(known[0][0])
            try:
                counts = [int(count) for count in json.loads(forwards)]
                if not isinstance(block, bytes):
                    raise TypeError(f"a block as {type(block).__name__}")
                yield Record(
                    step, int(first), float(time), bool(training), (counts[0], counts[1], counts[2]), layouts[number],
                    block, not_measured={str(k): str(v) for k, v in _dict(missed).items()},
                )  # fmt: skip
            except (ValueError, TypeError, IndexError, OverflowError, RecursionError) as error:
                raise BadLog(f"expected a log step at {step}, got {error!r}: {self.path}") from None

    def metric(self, name: str, layer: str) -> np.ndarray:
        """One statistic of a layer over the run: float32 (log steps, heads), NaN where there is none.

        name: one of `metrics.METRICS`. Raises KeyError for a layer that the log does not have, BadLog for a log that
        claims more than a gigabyte of them.
        """
        width, steps = self.layers[layer], len(self.steps)
        if width * steps > _MOST_NUMBERS:
            raise BadLog(
                f"expected at most {_MOST_NUMBERS:,} numbers, got {steps:,} log steps of {width:,} heads"
            )
        found = np.full((steps, width), np.nan, np.float32)
        for row, record in zip(found, self.records()):
            values = record_values(record, name).get(layer)
            if values is not None:
                row[: len(values)] = values
        return found


def record_values(record: Record, name: str) -> dict[str, np.ndarray]:
    """One statistic of each layer of a log step, (H,); empty if the log does not hold it. Raises BadLog."""
    if name not in record.layout.metrics:
        return {}
    row = record.table[record.layout.metrics.index(name)]
    found, start = {}, 0
    for layer, heads, *_ in record.layout.layers:
        found[layer] = row[start : start + heads]
        start += heads
    return found


def _dict(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise BadLog(f"expected JSON in a run log, got {error}") from None
    if not isinstance(found, dict):
        raise BadLog(f"expected an object in a run log, got {type(found).__name__}")
    return found
