"""Measuring a call at its place in a CUDA graph: launches that ask a number on the device what is wanted of them.

A replay runs no Python. The host sets that number, `control`, before it: see `kernels.shared.control`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.shared.control import EVALUATION, EXTREMES, NUMBER, STATISTICS
from ..reference import extremes as reference
from ..reference.context import Context
from ..reference.options import Options
from ..statistics.rows import RowStats
from . import api, engines, fold
from .extremes import Tensors, with_inner_stride

__all__ = ["EVALUATION", "EXTREMES", "NUMBER", "STATISTICS", "GraphedCall", "State", "new_state", "refuses"]

OTHER_DEVICE = "on a device that is neither a CPU nor a CUDA card"


class State(NamedTuple):
    """What a layer's calls are folded into, and what says whether they are.

    accumulator: (2, slots, NUM_FOLDED, H), of forwards under grad and of others: see `engine.fold`. result: int32
    (fields, H): see `reference.extremes`. control: int64 (1,).
    """

    accumulator: Tensor
    result: Tensor
    control: Tensor


def new_state(num_heads: int, control: Tensor, result: Tensor) -> State:
    """An empty state on the device of `control`."""
    accumulator = fold.new_accumulator(num_heads, control.device)
    return State(torch.stack([accumulator, accumulator]), result, control)


def refuses(query: Tensor, value: Tensor) -> str | None:
    """Why calls like this one are not measured by `GraphedCall`; None if they are. Tensors without numbers will do."""
    if query.device.type == "cpu":
        return None
    if query.device.type != "cuda":
        return OTHER_DEVICE
    return engines.kernels_refuse(query, value)


class GraphedCall:
    """Measures calls of these shapes, strides and options, without a look at the device by the host.

    tensors: of one such call, of which nothing is kept. options: without a mask. phase: added to the number of the
    forward, which says which rows the extremes come from.
    """

    def __init__(self, tensors: Tensors, options: Options, phase: int) -> None:
        query, key, value, _ = tensors
        self._options, self._phase = options, phase
        self._empty = min(query.numel(), key.numel(), value.numel()) == 0
        self._copies = any(x is not None and x.stride(3) != 1 for x in tensors)
        self._extremes: Any = None
        self._by_kernels = engines.kernels_cover(query, value)
        if self._by_kernels and not self._empty:
            kernel = engines.kernel("measure.extremes")
            mine = kernel.Tensors(*map(with_inner_stride, tensors))
            self._extremes = kernel.SingleLaunch(mine, options)

    def run(self, state: State, tensors: Tensors, extremes: bool = True, statistics: bool = True) -> None:
        """Measure one call as `state.control` says. The tensors are outside autograd.

        extremes, statistics: False where the host knows that the control asks for none.
        """
        if self._empty:
            return
        if not self._by_kernels:
            with torch.no_grad(), engines.no_autocast(tensors[0]):
                self._by_reference(state, tensors)
            return
        with engines.on_device(tensors[0]):
            if self._copies:
                tensors = tuple(map(with_inner_stride, tensors))  # type: ignore[assignment]
            if extremes:
                self._extremes.run(state.result, state.control, tensors, self._phase)
            if statistics:
                self._fold(state, tensors)

    def _fold(self, state: State, tensors: Tensors) -> None:
        query, key, value, out = tensors
        options, control = self._options, state.control
        probe = engines.kernel("portable.probe")
        rows = RowStats.unpack(*probe.probe(query, key, options, parts=1, control=control))
        context = Context(None, None, *fold.beside_by_kernels(query, key, value, out, rows, options, control))
        engines.kernel("measure.fold").fold(
            state.accumulator, query, key, rows, options, context, fold.kernel_layout(), control
        )

    def _by_reference(self, state: State, tensors: Tensors) -> None:
        query, key, value, out = tensors
        options, control = self._options, int(state.control.item())
        number = control & NUMBER
        if control & EXTREMES:
            reference.raise_result(
                state.result, query, key, value, out, options, None, number, number + self._phase
            )
        if control & STATISTICS:
            rows = api.attend(query, key, None, options)[1]
            accumulator = state.accumulator[1 if control & EVALUATION else 0]
            context = Context(None, None, *fold.beside(query, key, value, out, rows, options, None))
            fold.fold(accumulator, query, key, rows, options, context)
