"""What is remembered of a layer between its calls."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from .call import Unmeasurable

#: A layer whose measuring keeps failing is tried again at the 1st, 2nd, 4th, ... call after, and after so many at most.
LONGEST_REST = 64


@dataclass
class LayerState:
    """What is known of one layer from its calls so far.

    checked: its own attention function was compared with ours.
    agrees: what that function returned beside its output and was compared with ours, in words; None for nothing.
    fused_failed, measuring_failed: our attention cannot compute or measure its calls; they are not tried any more.
    failures: how often in a row measuring failed of which nothing shows that it lasts. failure: the latest reason.
    calls: numbers its calls. again: the number of the call that is tried next, after a failure.
    described: the places (EAGER, COMPILED) where calls of it, or inside it, had query and key.
    phases: the phase of the next sample, which is how many calls were probed before.

    Threads share it. Each of its changes is one step of the interpreter.
    """

    checked: bool = False
    agrees: str | None = None
    fused_failed: bool = False
    measuring_failed: bool = False
    failures: int = 0
    failure: str = ""
    calls: Iterator[int] = field(default_factory=itertools.count)
    again: int = 0
    described: set[str] = field(default_factory=set)
    phases: Iterator[int] = field(default_factory=itertools.count)

    def remarked(self, how: str) -> str:
        """How its calls are measured, and what was compared."""
        return how if self.agrees is None else f"{how}, its {self.agrees} agrees"

    def rest(self) -> None:
        """Leave out the next calls after a failure: 0, 1, 3, 7, ... of them."""
        self.failures += 1
        self.again = next(self.calls) + min(2 ** (self.failures - 1), LONGEST_REST)

    def rests(self) -> bool:
        """Whether the call that begins is left out."""
        return next(self.calls) < self.again or self.measuring_failed


class KeptLayers:
    """The layers of which calls are not kept now, and why."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self._states: dict[str, LayerState] = {}  # of these layers

    def rests(self, layer: str) -> bool:
        """Whether the call that begins is left out."""
        state = self._states.get(layer)
        return state is not None and state.rests()

    def fail(self, layer: str, error: Exception) -> None:
        """Leave out the next calls of a layer, or all of them if nothing else can come of it."""
        known = isinstance(error, Unmeasurable)
        self.reasons[layer] = str(error) if known else f"{type(error).__name__}: {error}"
        state = self._states.setdefault(layer, LayerState())
        state.rest()
        state.measuring_failed = isinstance(error, Unmeasurable) and error.lasting

    def succeed(self, layers: Iterable[str]) -> None:
        """Note that calls of these layers were taken."""
        for layer in layers if self._states else ():
            if self._states.pop(layer, None) is not None:
                self.reasons.pop(layer, None)


def note_described(layers: dict[str, LayerState], layer: str, place: str) -> None:
    """Note at a layer and at all modules around it that its calls are measured with query and key."""
    for outer in (layer, *(layer[:i] for i, letter in enumerate(layer) if letter == "."), ""):
        layers.setdefault(outer, LayerState()).described.add(place)
