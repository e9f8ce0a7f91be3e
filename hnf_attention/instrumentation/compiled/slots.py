"""Where an operator in a compiled graph finds the tensors that its layer's calls are folded into.

A slot's tensors are inputs of the graph, as weights are. They are marked as static, so CUDA graphs may write into them.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from ...compat import dynamo, running_backward
from ...engine.graphed import EXTREMES, STATISTICS, GraphedCall, State
from ...errors import let_out
from ...names import display_name
from ...tracing import without_dispatch_modes
from .. import observer
from ..call import FAILED_IN_GRAPH, AttentionCall, Unmeasurable
from ..graph_reader import GraphKind, GraphReader
from ..keeping import by_heads, viewed, views_of
from ..layer_state import LayerState
from ..shared_masks import apart

_log = logging.getLogger("hnf_attention")
#: By the address of their token.
_slots: weakref.WeakValueDictionary[int, Slot] = weakref.WeakValueDictionary()
_MOST_CALLS = 64  # descriptions that a slot keeps: one for each shape that its layer was called with


class Slot:
    """The state of one layer's calls in compiled graphs.

    accumulator, result, control: of `State`. token: one number, whose address says which slot it belongs to. A backend
    may hand copies of the others to the operator.
    """

    def __init__(self, kind: GraphKind, state: State, reader: GraphReader, module: nn.Module):
        self.accumulator, self.result, self.control = state
        self.token = torch.zeros(1, dtype=torch.int64, device=kind.device)
        for tensor in (*state, self.token):
            dynamo.mark_static(tensor)
        self._reader, self._module = reader, weakref.ref(module)
        self._calls: dict[Hashable, _Described | None] = {}
        self._merged = False
        self._state = LayerState()
        self._number = 0  # of the forward of the call before
        _slots[self.token.data_ptr()] = self

    def measure(
        self,
        state: State,
        tensors: tuple[Tensor, Tensor, Tensor, Tensor],
        mask: Tensor | None,
        rest: Hashable,
        describe: Callable[[], AttentionCall],
    ) -> None:
        """Measure one call: when its graph runs, or while a CUDA graph is captured, whose replays then measure it.

        tensors, mask: query, key, value, output and attn_mask as the graph has them. rest: what says the call beside
        them. No error comes out.
        """
        if (
            (self._state.failures and self._state.rests())
            or observer.thread.suspended
            or running_backward() != -1
        ):
            return  # inside a backward it is the second forward of a checkpoint
        capturing = tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()
        wanted = self._reader.wanted
        query, key, value, out = tensors
        shapes = query.shape, query.stride(), key.shape, key.stride(), value.shape, value.stride()
        of_mask = None if mask is None else (mask.shape, mask.stride(), mask.dtype)
        signature = shapes, out.shape, out.stride(), query.dtype, of_mask, rest
        known = signature in self._calls
        # Replays ask the control, so what is captured holds every launch. So does the first run, which compiles them.
        everything = capturing or not known
        if not (everything or wanted & (EXTREMES | STATISTICS)):
            return
        number, self._number = self._number, self._reader.number
        if known and number and number == self._number and not self._merged:
            self._merged = True
            self._note(self._calls[signature])
        try:
            with without_dispatch_modes(), apart():
                call = self._calls[signature] if known else self._describe(signature, tensors, mask, describe)
                if call is None:
                    return
                views = call.views
                if views is not None and (mask is None or call.mask_as_is):
                    mine = viewed(tensors, views)
                else:
                    described = describe()
                    mine, mask = _tensors(described, out), described.validated().attn_mask
                extremes, statistics = bool(wanted & EXTREMES), bool(wanted & STATISTICS)
                call.measure.run(state, mine, mask, everything or extremes, everything or statistics)
        except Exception as error:  # the monitor never ends a run
            let_out(error)
            self._fail(error)
        else:
            if self._state.failures:
                self._state = LayerState()
                self._note(call)

    def _describe(
        self,
        signature: Hashable,
        tensors: tuple[Tensor, ...],
        mask: Tensor | None,
        describe: Callable[[], AttentionCall],
    ) -> _Described | None:
        if len(self._calls) >= _MOST_CALLS:
            self._calls.clear()
        self._calls[signature] = None
        call = describe()
        mine, options = _tensors(call, tensors[3]), call.validated()
        measure, views = GraphedCall(mine, options, 0), views_of(tensors, mine)
        as_is = mask is not None and views_of([mask], [options.attn_mask]) == [None]
        self._calls[signature] = found = _Described(measure, views, as_is, call.interceptor)
        self._note(found)
        return found

    def _note(self, call: _Described | None) -> None:
        owner = self._owner()
        if owner is not None and call is not None:
            owner.observer.note_graphed(owner.layer, call.interceptor, self._merged)

    def _fail(self, error: Exception) -> None:
        owner = self._owner()
        if owner is None:
            return
        if isinstance(error, Unmeasurable):
            owner.observer.note_failed(owner.layer, str(error))
            return
        first = not self._state.failures
        self._state.rest()
        self._calls.clear()
        reason = f"{FAILED_IN_GRAPH}: {type(error).__name__}: {error}"
        if first:
            _log.warning("hnf-attention: %s: %s", display_name(owner.layer), reason)
        owner.observer.note_failed(owner.layer, reason)

    def _owner(self) -> observer.Owner | None:
        module = self._module()
        return None if module is None else observer.owner(module)


class _Described:
    """How calls of one signature are measured.

    views: see `keeping.views_of`. mask_as_is: the mask is used as the graph has it.
    """

    __slots__ = ("interceptor", "mask_as_is", "measure", "views")

    def __init__(self, measure: GraphedCall, views: list[Any] | None, mask_as_is: bool, interceptor: str):
        self.measure, self.views = measure, views
        self.mask_as_is, self.interceptor = mask_as_is, interceptor


def of(token: Tensor) -> Slot | None:
    """The slot that a token belongs to; None if nobody reads it any more."""
    return _slots.get(token.data_ptr())


def name_of(kind: GraphKind) -> str:
    """The attribute under which a layer keeps its slot of this kind."""
    words = kind.heads, kind.head_dim, str(kind.dtype).rpartition(".")[2], str(kind.device).replace(":", "_")
    return "slot_" + "_".join(map(str, words))


def _tensors(call: AttentionCall, output: Tensor) -> Any:
    """Query, key, value and output of a call, which are cast already: no autocast reaches into a graph.

    Raises Unmeasurable if values have other heads than keys.
    """
    value = call.value
    if value.shape[1] != call.key.shape[1]:
        raise Unmeasurable(f"it has {call.key.shape[1]} key heads and {value.shape[1]} value heads")
    return call.query, call.key, value, by_heads(call.output(output), call.query.shape[1], value)
