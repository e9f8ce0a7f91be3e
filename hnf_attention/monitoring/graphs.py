"""Where compiled graphs fold the calls that they measure by themselves, and what tells them what is wanted.

A CUDA graph has fixed addresses and runs no Python. So each layer has one state for all forwards, and one number on
each device, the control, says what the next forward's calls are folded into. It is set before the forward, by one
launch on the stream that is current there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..engine.graphed import EVALUATION, EXTREMES, STATISTICS, State, new_state
from ..instrumentation.graph_reader import GraphKind
from .accumulators import Kind, Lane, Place
from .extremes import StepExtremes
from .streams import LastUse, is_captured


class GraphStates:
    """The states of one model's layers, as `GraphReader` says. They are made while graphs are traced.

    note: gets each kind of call that may be folded here. number: of the forward that was told of last.
    """

    def __init__(self, extremes: StepExtremes, note: Callable[[Kind], None]) -> None:
        self.lane = Lane(reversible=True)
        self.wanted = 0
        self.number = 0
        self._extremes, self._note = extremes, note
        self._controls: dict[torch.device, Tensor] = {}
        self._streams = LastUse()  # that read the controls
        self._states: dict[GraphKind, State] = {}
        self._places: list[Place] = []  # of the extremes

    def __bool__(self) -> bool:
        """Whether a graph may measure anything."""
        return bool(self._states)

    def state(self, kind: GraphKind) -> State:
        """The state of this kind, a new one if there is none. Its tensors stay where they are."""
        if kind not in self._states:
            device = kind.device
            if device not in self._controls:
                self._controls[device] = torch.tensor([self.number | self.wanted], device=device)
            kinds = [
                Kind(kind.layer, 0, training, kind.heads, kind.head_dim, kind.dtype)
                for training in (True, False)
            ]
            with self._extremes.lock:
                result = self._extremes.result((kinds[0], device))
            state = new_state(kind.heads, self._controls[device], result)
            for each, accumulator in zip(kinds, state.accumulator):
                self._note(each)
                self.lane.adopt((each, device), accumulator)
            self._places.append((kinds[0], device))
            self._states[kind] = state
            self._raised()
        return self._states[kind]

    def tell(self, number: int, training: bool, statistics: bool, extremes: bool) -> None:
        """Say what is wanted of the forward that comes next.

        number: of a forward under grad, which is `training`. A capture keeps nothing of it: replays are told.
        """
        self.number = number
        self.wanted = (
            STATISTICS * statistics + EXTREMES * (extremes and training) + EVALUATION * (not training)
        )
        self._streams.use(("control", device) for device in self._controls)
        for device, control in self._controls.items():
            if is_captured(device):
                self.lane.touch_all()  # which notes that replays may fold here
            else:
                control.fill_(number | self.wanted)
        self._raised()

    def _raised(self) -> None:
        if self.wanted & EXTREMES:
            with self._extremes.lock:
                self._extremes.mark_raised(self._places)

    @property
    def folds(self) -> bool:
        """Whether the forward that was told of last is folded."""
        return bool(self._states) and bool(self.wanted & STATISTICS)

    def end(self, failed: bool) -> None:
        """Keep what the forward folded, or drop it."""
        if self.folds:
            self.lane.touch_all()
            self.lane.end(failed)

    def settle(self) -> None:
        """Have the current stream wait for all that was folded here."""
        self.end(failed=False)
        self.lane.settle()
