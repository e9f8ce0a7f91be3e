"""Where attention calls are folded on the device: one set of accumulators for each forward that runs at a time.

A set takes one forward after the other. What a forward gave is kept when it has ended well, and dropped when it
raised: a forward that is tried again after an exception would count twice.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import compat
from ..engine import fold
from ..instrumentation.call import FIRST_IN_CAPTURE, Unmeasurable
from ..tracing import without_dispatch_modes
from .streams import LastUse, is_captured


class Kind(NamedTuple):
    """What the calls that are folded together have in common.

    call: how many calls the layer made before in the same forward. training: the forward ran under grad.
    """

    layer: str
    call: int
    training: bool
    num_heads: int
    head_dim: int
    dtype: torch.dtype


Place = tuple[Kind, torch.device]


class Lane:
    """The accumulators of one forward at a time.

    working: takes the calls in. kept: what the forwards before the running one gave, None if calls belong to no forward
        and cannot be taken back.
    """

    def __init__(self, reversible: bool) -> None:
        self.working: dict[Place, Tensor] = {}
        self.kept: dict[Place, Tensor] | None = {} if reversible else None
        self.forward: Any = None  # who uses the lane now; None if it is free
        self.thread = 0  # of the user
        self._touched: set[Place] = set()
        self._streams = LastUse()
        self._empty: dict[tuple[int, torch.device], Tensor] = {}

    def accumulator(self, place: Place) -> Tensor:
        """What a call at this place is folded into. The current stream waits for the one that used it last.

        Raises Unmeasurable for a first call inside the capture of a CUDA graph, each replay of which would start anew.
        """
        if place not in self.working:
            if is_captured(place[1]):
                raise Unmeasurable(FIRST_IN_CAPTURE)
            # Made inside inference mode, they could not be added to outside of it.
            with torch.inference_mode(False):
                working = self._new(place)
                kept = None if self.kept is None else self._new(place)
            # Nothing is noted before both exist: the device may be out of memory for either.
            self.working[place] = working
            if self.kept is not None and kept is not None:
                self.kept[place] = kept
        self._streams.use([place])
        self._touched.add(place)
        return self.working[place]

    def adopt(self, place: Place, accumulator: Tensor) -> None:
        """Take an empty accumulator that calls at this place are folded into without being asked for here."""
        with torch.inference_mode(False):
            kept = self._new(place)
        self.working[place] = accumulator
        if self.kept is not None:
            self.kept[place] = kept

    def touch_all(self) -> None:
        """Note that something may have been folded at every place, on the current stream."""
        self._streams.use(self.working)
        self._touched.update(self.working)

    def _new(self, place: Place) -> Tensor:
        size = place[0].num_heads, place[1]
        if size not in self._empty:
            self._empty[size] = fold.new_accumulator(*size)
        return self._empty[size].clone()

    def end(self, failed: bool) -> None:
        """Keep what was folded since the last `end`, or drop it; no wait for the device."""
        try:
            if self.kept is not None and self._touched:
                self._streams.use(self._touched)
                old, new = [[side[place] for place in self._touched] for side in (self.kept, self.working)]
                with without_dispatch_modes():
                    compat.copy_all(new, old) if failed else compat.copy_all(old, new)
        finally:
            self._touched.clear()

    def reset(self) -> None:
        """Start anew. The tensors stay where they are: replays of a captured graph go on adding to them."""
        self._streams.use(self.working)
        for side in (self.working, self.kept or {}):
            sources = [self._empty[kind.num_heads, device] for kind, device in side]
            compat.copy_all(list(side.values()), sources)
        self._streams.settle()

    def settle(self) -> None:
        """Have the current stream wait for all that was folded here."""
        self._streams.settle()
        self._streams.use(self.working)


class Lanes:
    """As many lanes as forwards have run at the same time, in threads of their own."""

    def __init__(self) -> None:
        self._lanes: list[Lane] = []
        self._lock = threading.Lock()

    def of(self, forward: Any) -> Lane:
        """The forward's lane until `release`; a free one if it has none.

        forward: an object with `failed`. None for a call that is kept at once, which gets a lane for itself.
        """
        thread = threading.get_ident()
        with self._lock:
            free = None
            for lane in self._lanes:
                if forward is not None and lane.forward is forward:
                    return lane
                if lane.thread == thread and forward is not None and _is_forward(lane.forward):
                    # One thread runs one forward at a time, so that forward is over and nobody said so.
                    lane.end(failed=bool(lane.forward.failed))
                    lane.forward = None
                if lane.forward is None and (lane.kept is not None) == (forward is not None):
                    free = free or lane
            if free is None:
                free = Lane(reversible=forward is not None)
                self._lanes.append(free)
            free.forward, free.thread = self if forward is None else forward, thread
            return free

    def end(self, forward: Any, failed: bool) -> bool:
        """End a forward. Returns whether it had a lane, which is free now."""
        with self._lock:
            lane = next((lane for lane in self._lanes if lane.forward is forward), None)
        if lane is None:
            return False
        try:
            lane.end(failed)
        finally:
            lane.forward = None
        return True

    def release(self, lane: Lane) -> None:
        """End a call outside of any forward."""
        lane.end(failed=False)
        lane.forward = None

    @contextmanager
    def to_read(self) -> Iterator[list[Lane]]:
        """The lanes that no other thread uses now; nobody else can use them inside the context.

        Other threads' forwards, and what their lanes held before, belong to the next snapshot.
        """
        users: list[tuple[Lane, Any]] = []
        try:
            with self._lock:
                lanes = [x for x in self._lanes if x.forward is None or x.thread == threading.get_ident()]
                for lane in lanes:
                    lane.end(failed=False)
                    lane.settle()
                    users.append((lane, lane.forward))
                    lane.forward = self
            yield lanes
        finally:
            for lane, user in users:
                lane.forward = user


def _is_forward(user: object) -> bool:
    return hasattr(user, "failed")
