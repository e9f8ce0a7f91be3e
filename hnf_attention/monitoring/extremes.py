"""The extremes of the steps between two snapshots: of calls that were kept, not measured."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..engine import extremes as engine
from ..reference import extremes as reference
from ..statistics.fields import STEP_FIELDS
from .accumulators import Kind, Place
from .forward_steps import ForwardSteps
from .streams import LastUse

if TYPE_CHECKING:
    from ..instrumentation.keeping import KeptForward


class StepExtremes:
    """One result for each kind of call, on the device where its calls run; they lie there until they are read.

    Forwards under grad are counted here, from 1, whether their calls are kept or measured. Users hold `lock`.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._results: dict[Place, Tensor] = {}
        self._raised: set[Place] = set()  # since they were read
        self._streams = LastUse()  # that raised or read them, by device
        self.forwards = ForwardSteps()

    def prepared(self, kinds: Sequence[Kind], kept: KeptForward) -> Prepared:
        """What `record` needs for calls of these kinds, and for later ones of the same descriptions."""
        places = [(kind, call.device) for kind, call in zip(kinds, kept.calls)]
        calls = [
            engine.Call(tensors, call.options, call.left_out, self.result(place))
            for place, call, tensors in zip(places, kept.calls, kept.tensors)
        ]
        return Prepared(places, engine.Prepared(calls))

    def record(self, prepared: Prepared, kept: KeptForward, step: int) -> None:
        """Raise the results by calls of one forward, without waiting for the device."""
        number = self.forwards.number(kept.forward.number, step)
        self._use(prepared.places)
        self._raised.update(prepared.places)
        prepared.calls.run(kept.tensors, number, number)

    def mark_raised(self, places: Collection[Place]) -> None:
        """Note that what runs next on the current stream may raise the results of these places."""
        self._use(places)
        self._raised.update(places)

    def _use(self, places: Collection[Place]) -> None:
        self._streams.use((None, device) for device in {device for _, device in places})

    def result(self, place: Place) -> Tensor:
        """The result of a place, which stays where it is."""
        if place not in self._results:
            with torch.inference_mode(False):
                self._results[place] = reference.new_result(place[0].num_heads, place[1])
        return self._results[place]

    def results(self, kinds: Collection[Kind] | None = None) -> list[tuple[Place, Tensor]]:
        """The results of these kinds, None for all, that were raised since they were read, by whatever stream.

        They come in the order in which their layers first ran.
        """
        self._streams.settle()
        self._use(self._raised)
        raised = [(place, result) for place, result in self._results.items() if place in self._raised]
        return [(place, result) for place, result in raised if kinds is None or place[0] in kinds]

    def restart(self, kinds: Collection[Kind] | None = None) -> None:
        """Start the results of these kinds anew, None for all."""
        for place in [x for x in self._raised if kinds is None or x[0] in kinds]:
            self._results[place].fill_(reference.NONE)
            self._raised.discard(place)
        if not self._raised:
            self.forwards.restart()


class Prepared(NamedTuple):
    """places: of the results. calls: what raises them."""

    places: list[Place]
    calls: engine.Prepared


def decoded(results: np.ndarray, forwards: ForwardSteps) -> np.ndarray:
    """STEP_FIELDS (fields, H) of results (fields, H). forwards: knows the steps of the numbers in them."""
    found = reference.decoded(results)
    latest = found[2:].max(0)  # minus the first forward of any tensor
    numbers = [
        -forwards.step_of(int(-number)) if np.isfinite(number) else -np.inf for number in latest.tolist()
    ]
    return np.concatenate([found, [numbers]])


def with_steps(folded: np.ndarray, steps: np.ndarray | None = None) -> np.ndarray:
    """The values of a `HeadStats`: what was folded (NUM_FOLDED, H) and STEP_FIELDS (fields, H), None for nothing."""
    if steps is None:
        steps = np.full((len(STEP_FIELDS), folded.shape[1]), -np.inf)
    return np.concatenate([folded, steps])
