"""The extremes of the steps between two snapshots: of calls that were kept, not measured."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..engine import extremes as engine
from ..reference import extremes as reference
from ..statistics.fields import NUM_FOLDED, NUM_SUMS, STEP_FIELDS
from .accumulators import Kind, Place

if TYPE_CHECKING:
    from ..instrumentation.keeping import KeptForward


class StepExtremes:
    """One result for each kind of call, on the device where its calls run; they lie there until they are read."""

    def __init__(self) -> None:
        self._results: dict[Place, Tensor] = {}
        self._forwards: list[tuple[int, int]] = []  # number and step of the forwards since the last reading
        self._phase = 0

    def prepared(self, kinds: Sequence[Kind], kept: KeptForward) -> engine.Prepared:
        """What `record` needs for calls of these kinds, and for later ones of the same descriptions."""
        calls = []
        for kind, call, tensors in zip(kinds, kept.calls, kept.tensors):
            result = self._result((kind, call.device))
            calls.append(engine.Call(tensors, call.options, call.left_out, result))
        return engine.Prepared(calls)

    def record(self, prepared: engine.Prepared, kept: KeptForward, step: int) -> None:
        """Raise the results by calls of one forward, without waiting for the device."""
        number = kept.forward.number
        if not self._forwards or self._forwards[-1][0] != number:
            self._forwards.append((number, step))
            self._phase += 1
        prepared.run(kept.tensors, number, self._phase)

    def _result(self, place: Place) -> Tensor:
        if place not in self._results:
            with torch.inference_mode(False):
                self._results[place] = reference.new_result(place[0].num_heads, place[1])
        return self._results[place]

    def results(self) -> Iterator[tuple[Place, Tensor]]:
        """The results that were raised since the last reading, if any."""
        return iter(self._results.items() if self._forwards else ())

    def restart(self) -> Steps:
        """Start anew. Returns the steps of the forwards until now, for `decoded`."""
        for result in self._results.values() if self._forwards else ():
            result.fill_(reference.NONE)
        forwards, self._forwards = self._forwards, []
        return Steps(forwards)


class Steps:
    """Which step each forward was part of."""

    def __init__(self, forwards: Sequence[tuple[int, int]]) -> None:
        self._numbers = [number for number, _ in forwards]
        self._steps = [step for _, step in forwards]

    def decoded(self, results: np.ndarray) -> np.ndarray:
        """STEP_FIELDS (fields, H) of results (fields, H), int32."""
        found = reference.decoded(results)
        firsts = np.where(np.isneginf(found[2:]), -np.inf, -self._step_of(-found[2:]))
        return np.concatenate([found[:2], firsts, found[2:].max(0, keepdims=True)])

    def _step_of(self, numbers: np.ndarray) -> np.ndarray:
        places = [bisect_right(self._numbers, number) - 1 for number in np.ravel(numbers).tolist()]
        return np.reshape([float(self._steps[place]) for place in places], numbers.shape)


def with_steps(folded: np.ndarray | None, steps: np.ndarray | None, num_heads: int) -> np.ndarray:
    """The values of a `HeadStats`: what was folded (NUM_FOLDED, H) and STEP_FIELDS (fields, H). None for nothing."""
    if folded is None:
        folded = np.zeros((NUM_FOLDED, num_heads))
        folded[NUM_SUMS:] = -np.inf
    if steps is None:
        steps = np.full((len(STEP_FIELDS), num_heads), -np.inf)
    return np.concatenate([folded, steps])
