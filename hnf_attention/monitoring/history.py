"""The snapshots of a run, in a bounded amount of memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import overload

import numpy as np

from ..statistics.heads import HeadStats, Snapshot

HISTORY_BYTES = 64 * 2**20
#: The most snapshots that are kept, however small: every log step hands a list of them to the diagnosis.
HISTORY_LENGTH = 10_000
#: So many of the latest snapshots are thinned last: the rules fit lines to ten of each layer.
WINDOW = 20
# What Python needs beside the numbers, measured for CPython 3.11: a snapshot with its dict, a layer with its array.
_SNAPSHOT_BYTES, _LAYER_BYTES = 800, 450


class History(Sequence[Snapshot]):
    """Snapshots, oldest first, that take `limit` bytes at most.

    When the limit is reached, the oldest numbers go to float32 first: a relative error of 6e-8, far below what a trend
    or a plot shows. Layers with numbers that float32 cannot hold (squares above 3e38) stay in float64. After that,
    snapshots are dropped. The last WINDOW are all kept if they fit. Before them, gaps grow in proportion to age: they
    double again and again. The first snapshot, the one with the largest score and the one with the lowest entropy
    of a head are kept as long as more than four snapshots fit.

    Raises ValueError unless limit is an int >= 1.
    """

    def __init__(self, limit: int = HISTORY_BYTES) -> None:
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ValueError(f"expected history_bytes to be an int >= 1, got {limit!r}")
        self.limit = limit
        self._snapshots: list[Snapshot] = []
        self._sizes: list[int] = []
        self._peaks: list[tuple[float, float]] = []  # largest |score| and -(lowest normalized entropy)
        self._narrow = 0  # so many of the oldest are in float32
        self.bytes = 0  # how much memory the snapshots take

    def append(self, snapshot: Snapshot) -> None:
        """Add the latest snapshot. It stays as it is until another one is added."""
        self._snapshots.append(snapshot)
        self._sizes.append(_size(snapshot))
        self.bytes += self._sizes[-1]
        self._peaks.append(_peaks(snapshot))
        while self._narrow < len(self) - 1 and self.bytes > self.limit:
            narrow = _in_float32(self._snapshots[self._narrow])
            self.bytes += _size(narrow) - self._sizes[self._narrow]
            self._snapshots[self._narrow], self._sizes[self._narrow] = narrow, _size(narrow)
            self._narrow += 1
        if len(self) > 1 and (self.bytes > self.limit or len(self) > HISTORY_LENGTH):
            self._thin()

    def extend(self, snapshots: Sequence[Snapshot]) -> None:
        """Add snapshots, the oldest one first."""
        for snapshot in snapshots:
            self.append(snapshot)

    def _thin(self) -> None:
        """Drop snapshots until there is room again, and an eighth of those before the window, so that this is rare."""
        before = len(self) - min(WINDOW, len(self) // 2)
        target = max(1, len(self) - max(1, before // 8))
        while len(self) > 1 and (len(self) > target or self.bytes > self.limit):
            self._drop(self._least_needed(max(1, len(self) - target)))

    def _least_needed(self, count: int) -> set[int]:
        """At most `count` snapshots before the window whose neighbours are closest together, compared with their age.

        No two of them are neighbours.
        """
        if len(self) <= 4:
            return {0}
        steps = np.array([snapshot.step for snapshot in self._snapshots], dtype=np.float64)
        gap = np.full(len(steps), np.inf)
        # The divisor is an age of at least one step: a run that resumed may have come to the same step again.
        gap[1:-1] = (steps[2:] - steps[:-2]) / np.maximum(steps[-1] - steps[1:-1], 1.0)
        gap[len(steps) - min(WINDOW, len(steps) // 2) :] = np.inf
        for peak in zip(*self._peaks):
            gap[int(np.argmax(peak))] = np.inf
        chosen: set[int] = set()
        for index in np.argsort(gap)[: np.isfinite(gap).sum()].tolist():
            if len(chosen) < count and not {index - 1, index + 1} & chosen:
                chosen.add(index)
        return chosen or {1}  # a window that does not fit loses its oldest

    def _drop(self, chosen: set[int]) -> None:
        kept = [index for index in range(len(self)) if index not in chosen]
        self._narrow -= sum(index < self._narrow for index in chosen)
        self._snapshots = [self._snapshots[index] for index in kept]
        self._sizes = [self._sizes[index] for index in kept]
        self._peaks = [self._peaks[index] for index in kept]
        self.bytes = sum(self._sizes)

    @overload
    def __getitem__(self, index: int) -> Snapshot: ...
    @overload
    def __getitem__(self, index: slice) -> list[Snapshot]: ...
    def __getitem__(self, index: int | slice) -> Snapshot | list[Snapshot]:
        return self._snapshots[index]

    def __len__(self) -> int:
        return len(self._snapshots)

    def __repr__(self) -> str:
        span = f", steps {self[0].step} to {self[-1].step}" if self else ""
        return (
            f"History of {len(self)} snapshots{span}, {self.bytes / 2**20:.3g} of {self.limit / 2**20:.3g} MB"
        )


def _size(snapshot: Snapshot) -> int:
    numbers = sum(stats.values.nbytes for stats in snapshot.layers.values())
    numbers += sum(ranges.nbytes for mark in snapshot.marks for ranges in mark.ranges.values())
    return numbers + _SNAPSHOT_BYTES + _LAYER_BYTES * len(snapshot.layers)


def _peaks(snapshot: Snapshot) -> tuple[float, float]:
    """The snapshot's largest |score|, and minus its lowest normalized entropy; -inf where there is none."""
    if not snapshot.layers:
        return -np.inf, -np.inf
    largest = [np.fmax.reduce(stats.max_abs_logit, initial=-np.inf) for stats in snapshot.layers.values()]
    lowest = [np.fmin.reduce(stats.normalized_entropy, initial=np.inf) for stats in snapshot.layers.values()]
    return float(max(largest)), -float(min(lowest))


def _in_float32(snapshot: Snapshot) -> Snapshot:
    with np.errstate(over="ignore"):
        layers = {name: _narrowed(stats) for name, stats in snapshot.layers.items()}
        return replace(snapshot, layers=layers, marks=())  # marks are for the latest trend


def _narrowed(stats: HeadStats) -> HeadStats:
    narrow = stats.values.astype(np.float32)
    infinite = np.isinf(narrow)
    if infinite.any() and np.isfinite(stats.values[infinite]).any():
        return stats
    return replace(stats, values=narrow)
