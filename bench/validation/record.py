"""What one training run showed, in few bytes: enough to let the diagnosis judge it again without the run."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hnf_attention.diagnosis.ahead import Watch
from hnf_attention.monitoring.marks import MARK_EVERY, MARKS_KEPT
from hnf_attention.statistics.fields import (
    ERROR_FIELDS,
    MAX_FIELDS,
    NUM_FOLDED,
    NUM_SUMS,
    STEP_FIELDS,
    SUM_FIELDS,
)
from hnf_attention.statistics.heads import HeadStats, Mark, Snapshot

from .recipes import Recipe

Packed = tuple[str, bytes]  # a record's name and its bytes

#: Significant bits of a stored number, and of one that lines are fitted to: a line is the difference of large numbers.
#: Counts of rows are round numbers, which are stored exactly.
BITS, FINE_BITS = 9, 12
_RANGE, _MAX = (NUM_SUMS + MAX_FIELDS.index(name) for name in ("logit_range", "max_logit"))
_FINE = [
    SUM_FIELDS.index("normalized_entropy"),
    *(NUM_SUMS + MAX_FIELDS.index(name) for name in ("max_logit", "neg_min_logit", "logit_range")),
]
# Sums over blocks of rows give standard errors of sampled rows, and here all rows are measured.
_BLOCKS = [SUM_FIELDS.index(f"{name}_blocks") for name in ERROR_FIELDS]
_STEP_RANGE, _STEP_MAX = (NUM_FOLDED + STEP_FIELDS.index(name) for name in ("logit_range", "max_logit"))


@dataclass(frozen=True)
class Layer:
    """What a HeadStats says once. head_dim, dtype: of q and k. heads: number of query heads."""

    name: str
    heads: int
    head_dim: int
    dtype: str


@dataclass(frozen=True)
class Record:
    """One run, and its twin where it has one.

    losses, norms: training loss (nats per token) and gradient norm before clipping, of each step, (steps,).
    twin_losses: of the twin; empty without one. evaluation: losses on held-out text at the end, of the run and its
    twin. layers: in the order of the columns of `values`. readings: the steps of the readings, (T,). values: the
    numbers of the head statistics, float32 (T, NUM_FIELDS, heads of all layers).
    """

    recipe: Recipe
    losses: np.ndarray
    norms: np.ndarray
    twin_losses: np.ndarray
    evaluation: tuple[float, ...]
    layers: tuple[Layer, ...]
    readings: np.ndarray
    values: np.ndarray

    def history(self, every: int | None = None, watch: Watch | None = None) -> Iterator[Snapshot]:
        """The snapshots that a monitor with log_every = `every` would have; None for those of the run.

        watch: says which are read before their time; None for none.

        What lies between two of them goes into the extremes of the steps in between, and into the marks. A monitor
        takes these from one block of 64 rows of each sequence. From slower cadences they are taken here from all rows.
        Raises ValueError if `every` is no multiple of the run's own log_every.
        """
        own = self.recipe.log_every
        if every is not None and every % own:
            raise ValueError(f"expected a multiple of the run's log_every {own}, got {every}")
        between = np.full(self.values.shape[1:], -np.inf)[NUM_FOLDED:]
        marks: list[Mark] = []
        given: list[Snapshot] = []
        soon = False
        for step, values in zip(self.readings.tolist(), self.values):
            if every is not None and step % every and not soon:
                between = np.maximum(between, _extremes(values))
                if step % MARK_EVERY == 0:
                    marks.append(Mark(step, self._by_layer(between[_STEP_RANGE - NUM_FOLDED])))
                    soon = watch is not None and watch.urgent(given, marks[-MARKS_KEPT:])
                continue
            found = values.astype(np.float64)
            found[NUM_FOLDED:] = np.maximum(found[NUM_FOLDED:], between)
            between = np.full_like(between, -np.inf)
            if watch is not None and (every is None or step % every == 0):
                watch.restart()
            soon, kept, marks = False, tuple(marks[-MARKS_KEPT:]), []
            given.append(Snapshot(step, dict(self._layers(found)), marks=kept))
            yield given[-1]

    def _by_layer(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        ends = np.cumsum([layer.heads for layer in self.layers])
        return dict(zip([layer.name for layer in self.layers], np.split(numbers, ends[:-1])))

    def _layers(self, values: np.ndarray) -> Iterator[tuple[str, HeadStats]]:
        at = 0
        for layer in self.layers:
            yield layer.name, HeadStats(values[:, at : at + layer.heads].copy(), layer.head_dim, layer.dtype)
            at += layer.heads

    def to_bytes(self) -> bytes:
        items = {
            "recipe": self.recipe.to_dict(),
            "evaluation": [float(x) if np.isfinite(x) else None for x in self.evaluation],
            "layers": [[x.name, x.heads, x.head_dim, x.dtype] for x in self.layers],
        }
        file = io.BytesIO()
        np.savez_compressed(
            file,
            items=np.frombuffer(json.dumps(items).encode(), dtype=np.uint8),
            losses=self.losses.astype(np.float32),
            norms=_planes(rounded(self.norms, BITS)),
            twin_losses=self.twin_losses.astype(np.float32),
            readings=self.readings.astype(np.int32),
            values=_planes(np.moveaxis(self.values, 0, -1)),
        )
        return file.getvalue()

    @staticmethod
    def from_bytes(data: bytes) -> Record:
        with np.load(io.BytesIO(data), allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
        items = json.loads(arrays["items"].tobytes())
        return Record(
            Recipe.from_dict(items["recipe"]),
            arrays["losses"],
            _whole(arrays["norms"]),
            arrays["twin_losses"],
            tuple(np.nan if x is None else x for x in items["evaluation"]),
            tuple(Layer(*layer) for layer in items["layers"]),
            arrays["readings"],
            np.moveaxis(_whole(arrays["values"]), -1, 0),
        )


def record_of(
    recipe: Recipe,
    losses: np.ndarray,
    norms: np.ndarray,
    history: Sequence[Snapshot],
    twin_losses: np.ndarray | None = None,
    evaluation: Sequence[float] = (),
    columns: slice | None = None,
) -> Record:
    """The record of a run from the snapshots of its monitor. columns: of each layer's heads, None for all.

    Raises ValueError if the layers are not the same in all snapshots.
    """
    names = list(history[0].layers)
    if any(list(snapshot.layers) != names for snapshot in history):
        raise ValueError("expected the same layers in every snapshot")
    columns = columns or slice(None)
    chosen = [[stats.values[:, columns] for stats in snapshot.layers.values()] for snapshot in history]
    whole = np.stack([np.concatenate(parts, 1) for parts in chosen])
    values = rounded(whole, BITS)
    values[:, _FINE] = rounded(whole[:, _FINE], FINE_BITS)
    values[:, _BLOCKS] = 0.0
    layers = tuple(
        Layer(name, own.shape[1], stats.head_dim, stats.dtype)
        for own, (name, stats) in zip(chosen[-1], history[-1].layers.items())
    )
    return Record(
        recipe,
        losses,
        norms,
        np.empty(0, np.float32) if twin_losses is None else twin_losses,
        tuple(map(float, evaluation)),
        layers,
        np.array([snapshot.step for snapshot in history]),
        values,
    )


def _extremes(values: np.ndarray) -> np.ndarray:
    """STEP_FIELDS (fields, H) of a reading that is left out."""
    found = values[NUM_FOLDED:].astype(np.float64)
    here = [_MAX, _RANGE]
    there = [_STEP_MAX - NUM_FOLDED, _STEP_RANGE - NUM_FOLDED]
    found[there] = np.maximum(found[there], values[here])
    return found


def rounded(values: np.ndarray, significant: int) -> np.ndarray:
    """float32 numbers with so many significant bits; NaN and infinities stay."""
    with np.errstate(over="ignore"):
        bits = values.astype(np.float32).view(np.int32)
    drop = 24 - significant
    near = (bits + (1 << (drop - 1))) & ~((1 << drop) - 1)
    return np.where(np.isfinite(values), near, bits).view(np.float32)


def _planes(values: np.ndarray) -> np.ndarray:
    """Numbers as the bytes of their changes along the last axis, uint8 (4, ...): rounded ones compress well."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    changes = bits.copy()
    changes[..., 1:] ^= bits[..., :-1]
    return np.moveaxis(np.ascontiguousarray(changes)[..., None].view(np.uint8), -1, 0).copy()


def _whole(planes: np.ndarray) -> np.ndarray:
    changes = np.ascontiguousarray(np.moveaxis(planes, 0, -1)).view(np.uint32)[..., 0]
    return np.bitwise_xor.accumulate(changes, axis=-1).view(np.float32)


def read(paths: Iterable[Path]) -> Iterator[Record]:
    """The records of archives, in their order. A folder stands for the archives in it."""
    for path in paths:
        archives = sorted(path.glob("*.zip")) if path.is_dir() else [path]
        for each in archives:
            with zipfile.ZipFile(each) as archive:
                for name in archive.namelist():
                    yield Record.from_bytes(archive.read(name))
