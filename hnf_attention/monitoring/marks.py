"""Marks: how far the extremes have risen between two snapshots, copied to the host without waiting for the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..reference.extremes import decoded
from ..statistics.fields import STEP_FIELDS
from ..statistics.heads import Mark
from .accumulators import Kind
from .extremes import StepExtremes

#: Steps between two marks. A trend needs three points over 20 steps.
MARK_EVERY = 10
#: The latest so many marks are kept: those of the trend window, and one more.
MARKS_KEPT = 6

_RANGE = STEP_FIELDS.index("logit_range")


class _Copy(NamedTuple):
    """A mark on its way: the ranges of all kinds of calls in one tensor, and the event after which they are there."""

    step: int
    kinds: list[Kind]
    ranges: list[Tensor]  # of each device, on the host, int32
    events: list[torch.cuda.Event]

    @property
    def there(self) -> bool:
        return all(event.query() for event in self.events)


class Marks:
    """The marks since the last snapshot. name: what a layer's calls are called."""

    def __init__(self, extremes: StepExtremes, name: Callable[[Kind], str]) -> None:
        self._extremes, self._name = extremes, name
        self._copies: deque[_Copy] = deque(maxlen=MARKS_KEPT)
        self._told = 0  # the step of the latest mark that `news` gave

    def take(self, step: int) -> None:
        """Copy what the extremes are now. They go on rising."""
        with self._extremes.lock:
            found = [(place, result[_RANGE]) for place, result in self._extremes.results()]
            by_device: dict[torch.device, list[tuple[Kind, Tensor]]] = {}
            for (kind, device), ranges in found:
                by_device.setdefault(device, []).append((kind, ranges))
            copy = _Copy(step, [], [], [])
            for device, parts in by_device.items():
                together = torch.cat([ranges for _, ranges in parts])
                there = torch.empty(together.shape, dtype=together.dtype, pin_memory=together.is_cuda)
                there.copy_(together, non_blocking=True)
                if together.is_cuda:
                    event = torch.cuda.Event()
                    event.record(torch.cuda.current_stream(device))
                    copy.events.append(event)
                copy.kinds.extend(kind for kind, _ in parts)
                copy.ranges.append(there)
        if copy.kinds:
            self._copies.append(copy)

    def arrived(self) -> tuple[Mark, ...]:
        """Those whose copies have ended."""
        return tuple(self._read(copy) for copy in self._copies if copy.there)

    def news(self) -> tuple[Mark, ...]:
        """Those that have arrived, if one of them is new; else none. The host does not wait."""
        if not self._copies or self._copies[-1].step == self._told:
            return ()
        found = self.arrived()
        if not found or found[-1].step == self._told:
            return ()
        self._told = found[-1].step
        return found

    def end(self) -> tuple[Mark, ...]:
        """All of them, at a snapshot, for which the host has waited anyway; the next marks start anew."""
        for copy in self._copies:
            for event in copy.events:
                event.synchronize()
        found = self.arrived()
        self._copies.clear()
        return found

    def _read(self, copy: _Copy) -> Mark:
        ranges = np.concatenate([x.numpy() for x in copy.ranges])
        sizes = decoded(np.stack([ranges, ranges]))[0]
        return Mark(copy.step, dict(self._by_layer(copy.kinds, sizes)))

    def _by_layer(self, kinds: list[Kind], sizes: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        merged: dict[str, np.ndarray] = {}
        start = 0
        for kind in kinds:
            own, start = sizes[start : start + kind.num_heads], start + kind.num_heads
            name = self._name(kind)
            merged[name] = np.maximum(merged[name], own) if name in merged else own
        yield from merged.items()
