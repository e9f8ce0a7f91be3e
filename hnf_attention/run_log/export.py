"""A run log as files that other programs read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from ..errors import InputError
from .records import Record, plain

if TYPE_CHECKING:
    from .reader import RunLog

Progress = Callable[[int, int], None]
_NUMBERS_AT_ONCE = 1 << 20  # rows of a Parquet group, which a program reads at once


def to_jsonl(
    log: RunLog, target: str | PathLike[str] | TextIO, progress: Progress = lambda done, total: None
) -> None:
    """One line for each log step, event and scalar, told apart by "kind"; the first one describes the run.

    A "snapshot" has {layer: {metric: [a number per head]}}, null for NaN and infinities. target: a file, or a stream
    of text. Raises OSError.
    """
    if isinstance(target, (str, PathLike)):
        with Path(target).open("w", encoding="utf-8") as file:
            to_jsonl(log, file, progress)
        return
    for line in _lines(log, progress):
        target.write(f"{json.dumps(plain(line), allow_nan=False)}\n")


def _lines(log: RunLog, progress: Progress) -> Iterator[dict[str, Any]]:
    yield {"kind": "run", "layers": log.layers, "sessions": log.sessions, "not_measured": log.not_measured}
    total = len(log.steps)
    for done, record in enumerate(log.records(), 1):
        layers: dict[str, dict[str, list[float]]] = {}
        for (layer, *_), table in _by_layer(record):
            layers[layer] = {name: _digits(row) for name, row in zip(record.layout.metrics, table)}
        yield {
            "kind": "snapshot",
            "step": record.step,
            "first_step": record.first_step,
            "time": record.time,
            "training": record.training,
            "layers": layers,
        }
        progress(done, total)
    for event in log.events:
        detail = {name: value for name, value in event.detail.items() if name not in ("kind", "step")}
        yield {"kind": event.kind, "step": event.step, "change": event.change, **detail}
    for name, (steps, values) in log.scalars().items():
        for step, value in zip(steps.tolist(), values.tolist()):
            yield {"kind": "scalar", "name": name, "step": step, "value": value}


def to_parquet(log: RunLog, path: str | PathLike[str], progress: Progress = lambda done, total: None) -> None:
    """One row for each head and log step: step, layer, head, and a column for each statistic, NaN for none.

    Raises OSError, and InputError if pyarrow is not installed or the log holds no log step.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f'Parquet needs pyarrow: pip install "hnf-attention[parquet]" ({error})') from None
    total = len(log.steps)
    if total == 0:
        raise InputError(f"expected a run log with a log step, got none: {log.path}")
    names = dict.fromkeys(name for record in log.layouts for name in record.metrics)
    kinds = [("step", pyarrow.int64()), ("layer", pyarrow.string()), ("head", pyarrow.int32())]
    schema = pyarrow.schema([*kinds, *((name, pyarrow.float32()) for name in names)])
    with pyarrow.parquet.ParquetWriter(path, schema) as file:
        waiting: list[Any] = []
        for done, record in enumerate(log.records(), 1):
            waiting.append(_rows(pyarrow, schema, record, list(names)))
            if done == total or sum(each.num_rows for each in waiting) >= _NUMBERS_AT_ONCE:
                file.write_table(pyarrow.concat_tables(waiting))
                waiting.clear()
            progress(done, total)
        if waiting:
            file.write_table(pyarrow.concat_tables(waiting))


def _rows(pyarrow: Any, schema: Any, record: Record, names: list[str]) -> Any:
    layers = record.layout.layers
    table, heads = record.table, record.layout.heads
    none = np.full(heads, np.nan, np.float32)
    places = {name: row for name, row in zip(record.layout.metrics, table)}
    columns: list[Any] = [
        np.full(heads, record.step),
        np.repeat(np.array([layer[0] for layer in layers], dtype=object), [layer[1] for layer in layers]),
        np.concatenate(
            [np.arange(layer[1], dtype=np.int32) for layer in layers] or [np.arange(0, dtype=np.int32)]
        ),
        *(places.get(name, none) for name in names),
    ]
    return pyarrow.table([pyarrow.array(x, field.type) for x, field in zip(columns, schema)], schema=schema)


def _by_layer(record: Record) -> Iterator[tuple[tuple[Any, ...], np.ndarray]]:
    table, start = record.table, 0
    for layer in record.layout.layers:
        yield layer, table[:, start : start + layer[1]]
        start += layer[1]


def _digits(values: np.ndarray) -> list[float]:
    """Six digits, more than a block holds."""
    return [float(f"{value:.6g}") for value in values.tolist()]
