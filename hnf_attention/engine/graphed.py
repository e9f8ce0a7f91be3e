"""Measuring a call at its place in a CUDA graph: launches that ask a number on the device what is wanted of them.

A replay runs no Python. The host sets that number, `control`, before it: see `kernels.shared.control`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.shared.control import EVALUATION, EXTREMES, NUMBER, STATISTICS
from ..reference import extremes as reference
from ..reference.context import Context, hidden_keys
from ..reference.options import Options
from ..statistics.rows import RowStats
from . import api, engines, fold
from .extremes import Tensors, with_inner_stride

__all__ = ["EVALUATION", "EXTREMES", "NUMBER", "STATISTICS", "GraphedCall", "State", "new_state", "refuses"]

OTHER_DEVICE = "on a device that is neither a CPU nor a CUDA card"


#: Queries that are left out, boolean (B, M), and keys that no query sees, (B, N); each may be None.
_Padding = tuple[Tensor | None, Tensor | None]


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

    tensors, options: of one such call, of which no tensor is kept. phase: added to the number of the forward, which
    says which rows the extremes come from.
    """

    def __init__(self, tensors: Tensors, options: Options, phase: int) -> None:
        query, key, value, _ = tensors
        self._options, self._phase = options._replace(attn_mask=None), phase
        self._empty = min(query.numel(), key.numel(), value.numel()) == 0
        self._copies = any(x is not None and x.stride(3) != 1 for x in tensors)
        self._extremes: Any = None
        self._by_kernels = engines.kernels_cover(query, value)
        if self._by_kernels and not self._empty:
            kernel = engines.kernel("measure.extremes")
            mine = kernel.Tensors(*map(with_inner_stride, tensors))
            leaves_out = options.attn_mask is not None and query.shape[2] == key.shape[2]
            self._extremes = kernel.SingleLaunch(mine, options, leaves_out)

    def run(
        self,
        state: State,
        tensors: Tensors,
        mask: Tensor | None = None,
        extremes: bool = True,
        statistics: bool = True,
    ) -> None:
        """Measure one call as `state.control` says. The tensors are outside autograd.

        mask: as `Options.attn_mask`. Keys that it hides from all queries are padding, and in self-attention so are
        their queries. extremes, statistics: False where the host knows that the control asks for none.
        """
        if self._empty or not (extremes or statistics):
            return
        query, key = tensors[:2]
        options, hidden = self._options, None
        if mask is not None:
            options = options._replace(attn_mask=mask)
            hidden = hidden_keys(options, query.shape[0], query.shape[2], key.shape[2])
        padding = hidden if query.shape[2] == key.shape[2] else None, hidden
        if not self._by_kernels:
            with torch.no_grad(), engines.no_autocast(query):
                self._by_reference(state, tensors, options, padding)
            return
        with engines.on_device(query):
            if self._copies:
                tensors = tuple(map(with_inner_stride, tensors))  # type: ignore[assignment]
            if extremes:
                self._extremes.run(state.result, state.control, tensors, self._phase, options, padding[0])
            if statistics:
                self._fold(state, tensors, options, padding)

    def _fold(self, state: State, tensors: Tensors, options: Options, padding: _Padding) -> None:
        query, key, value, out = tensors
        control = state.control
        probe = engines.kernel("portable.probe")
        rows = RowStats.unpack(*probe.probe(query, key, options, parts=1, control=control))
        beside = fold.beside_by_kernels(query, key, value, out, rows, options, padding[0], control)
        context = Context(*padding, *beside)
        engines.kernel("measure.fold").fold(
            state.accumulator, query, key, rows, options, context, fold.kernel_layout(), control
        )

    def _by_reference(self, state: State, tensors: Tensors, options: Options, padding: _Padding) -> None:
        query, key, value, out = tensors
        control = int(state.control.item())
        number = control & NUMBER
        if control & EXTREMES:
            reference.raise_result(
                state.result, query, key, value, out, options, padding[0], number, number + self._phase
            )
        if control & STATISTICS:
            rows = api.attend(query, key, None, options)[1]
            accumulator = state.accumulator[1 if control & EVALUATION else 0]
            beside = fold.beside(query, key, value, out, rows, options, padding[0])
            fold.fold(accumulator, query, key, rows, options, Context(*padding, *beside))
