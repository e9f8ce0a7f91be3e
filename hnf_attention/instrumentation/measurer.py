"""Runs the attention calls of one model and measures them: the `Observer` behind an `Instrumentation`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import compat
from ..engine import api, engines, fold
from ..engine.call import Call
from ..errors import let_out
from ..names import call_name, display_name
from ..reference.context import Context
from ..reference.masks import take_rows
from ..reference.options import Options
from ..reference.sampling import effective_period
from ..statistics.rows import RowStats
from ..tracing import without_dispatch_modes, without_tangents
from . import observer, scores, witness
from .call import COMPILED, EAGER, FAILED_IN_GRAPH, AttentionCall, Unmeasurable, keys_hidden
from .decoding import Decoding
from .equivalence import check_returned
from .forwards import Forwards
from .keeping import Described, KeptForward, described
from .layer_state import KeptLayers, LayerState, note_described
from .measurement import Forward, Measurement, without_call
from .padding import Padding

_log = logging.getLogger("hnf_attention")

#: The most calls of a layer in one forward that are told apart: a decoding loop inside of a forward has thousands.
MOST_CALLS = 16


class Measurer:
    """The part of an `Instrumentation` that interceptors call back, as `observer.Observer` says.

    mode, sample: as `instrument` takes them. attention_classes: the classes that it found for them.
    forwards: the forward passes of the model.
    on_measure: gets the `Measurement` of each attention call; the second forward of a checkpoint is no call of its own.
        While it is None, `latest` keeps the last measurement of each layer. Its calls do not overlap.
    on_forward_begin, on_forward_end: get each forward of the model when it begins, and when it has ended.
    on_kept: gets calls that were not measured, of one forward at a time, while `keeping`.
    queries_split: other processes hold other queries of the same sequences. A call with fewer queries than keys then
        continues no earlier call.
    """

    def __init__(
        self,
        mode: str,
        sample: int | None,
        attention_classes: tuple[type[nn.Module], ...],
        forwards: Forwards,
    ):
        self.mode, self.sample = mode, sample
        self.on_measure: Callable[[Measurement], None] | None = None
        self.on_forward_begin: Callable[[Forward], None] | None = None
        self.on_forward_end: Callable[[Forward], None] | None = None
        self.on_kept: Callable[[KeptForward], None] | None = None
        self.queries_split = False
        self._attention_classes, self._forwards = attention_classes, forwards
        self._delivery = threading.RLock()
        self._repeated: set[str] = set()  # layers of which a forward had several invocations
        self._merged: set[str] = set()  # layers whose invocations cannot be told apart
        self._numerous: set[str] = set()  # layers of which a forward had more than MOST_CALLS invocations
        self._doubts: dict[tuple[str, str], str] = {}
        self.latest: dict[str, Measurement] = {}
        self.padding = Padding()
        self._decoding: dict[tuple[str, int], Decoding] = {}
        self._layers: dict[str, LayerState] = {}
        self._measured: dict[str, str] = {}
        self._problems: dict[str, str] = {}
        self._slowed: set[str] = set()
        self.kept_layers = KeptLayers()
        self._said: set[str] = set()  # kinds of failures that were logged

    def note(self, layer: str, reason: str) -> None:
        """List `layer`, or some of its calls, as not measured."""
        self._problems[layer] = reason

    def note_slowed(self, layer: str) -> None:
        """Say in the coverage that `layer` gave up PyTorch's inference fast path to be measured."""
        self._slowed.add(layer)

    def note_graphed(self, layer: str, interceptor: str, merged: bool) -> None:
        """Say in the coverage that compiled graphs measure `layer` by themselves, its calls of a forward together."""
        self._merged |= {layer} if merged else set()
        compiled = "" if self.mode == "probe" else f": {COMPILED}"
        self._measured[layer] = f"probe{compiled} ({interceptor})"
        if self._problems.get(layer, "").startswith(FAILED_IN_GRAPH):
            del self._problems[layer]

    def doubt(self, layer: str, kind: str, reason: str | None) -> None:
        """List a softmax of `layer` as not measured for this reason, until None takes back the doubt of this kind."""
        if reason is None:
            self._doubts.pop((layer, kind), None)
        else:
            self._doubts[layer, kind] = reason

    def left_out(self, layer: str, query: Tensor) -> Tensor | None:
        """The queries (B, H, M, D) of a call that are not judged, as far as its keys do not say it; boolean (B, M)."""
        return self.padding.left_out(layer, query.shape[0], query.shape[2], -1, None, query.device)

    def is_named(self, module: nn.Module) -> bool:
        """Whether the module is of one of the `attention_classes`."""
        return isinstance(module, self._attention_classes)

    def attend(self, layer: str, describe: Callable[[], AttentionCall], original: Callable[[], Any]) -> Any:
        """Run one attention call of `layer`, measure it, and return what `original()` returns or our output like it.

        Only errors of the model's own attention come out. After any other error, the layer rests for some
        calls, and is not measured any more if nothing else can come of it.
        """
        state = self._layers.get(layer)
        if state is None:
            state = self._layers.setdefault(layer, LayerState())
        thread = observer.thread
        before, thread.suspended = thread.suspended, True
        try:
            if compat.running_backward() != -1:  # the second forward of a checkpoint
                return self._repeat(state, describe, original)
            rests = state.rests()
            if rests and (state.fused_failed or self.mode == "probe"):
                return original()
            return self._run(layer, state, rests, describe, original)
        finally:
            thread.suspended = before

    def _run(
        self,
        layer: str,
        state: LayerState,
        rests: bool,
        describe: Callable[[], AttentionCall],
        original: Callable[[], Any],
    ) -> Any:
        """rests: the call is not measured."""
        result = call = options = rows = failure = None
        done = fused = False
        output: Any = None
        try:
            with without_dispatch_modes():
                call = describe()
                if call.check is not None and not state.checked:
                    state.checked = call.check(call)
                call.cast()
                options = call.validated()
            fused = not state.fused_failed and self._takes(call)
            if fused:
                output, rows = api.attend(call.query, call.key, call.value, options, detached=True)
                result, done = call.from_output(output), True
        except Exception as error:  # of any kind: the model's own attention still has to run
            let_out(error)
            failure = error.with_traceback(None)
        if not done:
            result = original()
            output = None
            state.fused_failed |= failure is not None and not isinstance(failure, Unmeasurable)
        if failure is None and call is not None and options is not None and not rests:
            try:
                with without_dispatch_modes(), without_tangents(), engines.no_autocast(call.query):
                    if output is None and result is not None:
                        output = call.output(result)
                    rows = rows or (call.own_rows and call.own_rows())
                    self._measure(layer, state, call, options, rows, output, None if fused else result)
                self._succeed(layer, state, state.remarked(self._how(call, options, rows is not None)))
            except Exception as error:  # the monitor never ends a run
                let_out(error)
                failure = error.with_traceback(None)
        if failure is not None:
            self._give_up(layer, state, failure)
        return result

    def _repeat(
        self, state: LayerState, describe: Callable[[], AttentionCall], original: Callable[[], Any]
    ) -> Any:
        """Run the second forward of a checkpoint as the first one ran, so that it saves the same tensors; no record.

        Only our own errors are caught: the second forward of a checkpoint ends by raising one.
        """
        if self.mode == "probe" or state.fused_failed:
            return original()
        try:
            with without_dispatch_modes():
                call = describe()
                call.cast()
        except Unmeasurable:
            return original()
        if not self._takes(call):
            return original()
        output: Any = api.attend(call.query, call.key, call.value, call.validated(), detached=True)[0]
        return call.from_output(output)

    def _takes(self, call: AttentionCall) -> bool:
        """Whether our attention computes this call's output. Only properties of the call decide."""
        if call.why_left is not None:
            return False
        return self.mode == "fused" or (
            self.mode == "auto"
            and call.probe_preferred is None
            and engines.kernels_cover(call.query, call.value)
            and engines.fused_is_unmeasured(call.query, call.value) is None
        )

    def _how(self, call: AttentionCall, options: Options, fused: bool) -> str:
        """What the coverage says of a measured call."""
        if fused:
            slower = engines.why_slower(Call(call.query, call.key, call.value, options))
            return f"fused{'' if slower is None else f'; {slower}'} ({call.interceptor})"
        reason = self._why_probed(call)
        share = "" if self.sample in (None, 1) else f" of 1/{self.sample} of the rows"
        return f"probe{share}{'' if reason is None else f': {reason}'} ({call.interceptor})"

    def _why_probed(self, call: AttentionCall) -> str | None:
        """Why our attention did not take a call that it could have taken; None if it could not, or was not asked to."""
        if self.mode == "fused":
            return call.why_left
        if self.mode == "probe" or not engines.kernels_cover(call.query, call.value):
            return None
        unmeasured = engines.fused_is_unmeasured(call.query, call.value)
        return call.why_left or call.probe_preferred or (unmeasured and f"fused attention: {unmeasured}")

    def describe_kept(
        self, layer: str, number: int, describe: Callable[[], AttentionCall], output: Any
    ) -> Described | None:
        """The description of a call that gave `output`, and its tensors; None for a call that is not kept."""
        state = self._layers.setdefault(layer, LayerState())
        try:
            with torch.no_grad(), without_dispatch_modes():
                call = describe()
                if call.check is not None and not state.checked:
                    state.checked = call.check(call)
                found: Described = described(layer, min(number, MOST_CALLS - 1), call, output, self.padding)
                return found
        except Exception as error:  # the monitor never ends a run
            let_out(error)
            self.kept_layers.fail(layer, error)
            return None

    def _measure(
        self,
        layer: str,
        state: LayerState,
        call: AttentionCall,
        options: Options,
        rows: RowStats | None,
        output: Tensor | None,
        result: Any,
    ) -> None:
        """rows: of the fused pass, None for a call to be probed. output: (B, H or 1, M, any), None if not known.

        result: what the model's own attention returned.
        """
        query, key = call.query, call.key
        if rows is None:
            measurement = self._probe(layer, state, call, options)
        else:
            measurement = Measurement(layer, rows, query.shape[3], call.dtype, 1, query, key, options)
        if measurement.beside is None:
            measurement.context = self._context(layer, call, options, measurement.rows, output)
        else:
            self._leave_out(measurement, query.shape[2])
        if state.agrees is None:
            state.agrees = check_returned(call, measurement.rows, result)
        if call.place not in state.described:
            note_described(self._layers, layer, call.place)
            witness.record()
        self._deliver(measurement, call.place)

    @torch.no_grad()
    def _probe(self, layer: str, state: LayerState, call: AttentionCall, options: Options) -> Measurement:
        """Measure all rows or the next sample of them."""
        phase = next(state.phases)
        query, key = call.query, call.key
        period = 1 if self.sample is None else effective_period(self.sample, query.shape[2])
        if call.modify is not None:
            return scores.modified(layer, call, options, period, phase)
        if period == 1:
            rows = api.attend(query, key, None, options)[1]
        else:
            rows = api.attend_sample(query, key, options, (period, phase))
        return Measurement(layer, rows, query.shape[3], call.dtype, period, query, key, options)

    @torch.no_grad()
    def _context(
        self,
        layer: str,
        call: AttentionCall,
        options: Options,
        rows: RowStats,
        output: Tensor | None,
    ) -> Context:
        """Which rows of the call count, and what became of it."""
        query, key = call.query, call.key
        batch, _, num_queries, _ = query.shape
        hidden = keys_hidden(options, batch, num_queries, key.shape[2])
        left_out = self.padding.left_out(layer, batch, num_queries, key.shape[2], hidden, query.device)
        beside = fold.beside(query, key, call.value, output, rows, options, left_out)
        return Context(left_out, hidden, *beside)

    def _leave_out(self, measurement: Measurement, num_queries: int) -> None:
        """Leave out the rows that are not judged, in a measurement that is complete but for them."""
        beside, index = measurement.beside, measurement.rows.row_index
        if beside is None:
            return
        batch, heads = measurement.rows.lse.shape[:2]
        hidden = beside.left_out[:, 0] if index is None and beside.left_out is not None else None
        num_keys, device = beside.key_square.shape[2], measurement.rows.lse.device
        left_out = self.padding.left_out(measurement.layer, batch, num_queries, num_keys, hidden, device)
        rows = None if left_out is None else left_out[:, None]
        if rows is not None and index is not None:
            rows = take_rows(rows.expand(-1, heads, -1), index)
        measurement.beside = beside._replace(left_out=rows)

    def observe(
        self, layer: str, interceptor: str, measure: Callable[[], Measurement], place: str = EAGER
    ) -> None:
        """Take in what `measure()` gives of an attention that the model computed by itself. No error comes out.

        place: where it ran. In a compiled graph, where little is known of a softmax, it is skipped if attention in its
            module is caught with query and key.
        """
        state = self._layers.setdefault(layer, LayerState())
        if state.rests() or (place == COMPILED and place in state.described):
            return
        try:
            with without_dispatch_modes():
                measurement = measure()
                self._leave_out(measurement, measurement.rows.lse.shape[2])
                self._deliver(measurement, place)
        except Exception as error:  # the monitor never ends a run
            let_out(error)
            self._give_up(layer, state, error.with_traceback(None))
        else:
            self._succeed(layer, state, f"probe ({interceptor})")

    def _deliver(self, measurement: Measurement, place: str) -> None:
        layer = measurement.layer
        measurement.forward, call, merged = self._forwards.place(layer, place)
        measurement.call = min(call, MOST_CALLS - 1)
        with self._delivery:
            if call >= MOST_CALLS:
                self._numerous.add(layer)
            if merged:
                self._merged.add(layer)
            self._continue(measurement)
            if self.on_measure is not None:
                self.on_measure(measurement)
                return
            if measurement.call and layer not in self._repeated:
                self._repeated.add(layer)
                renamed = {call_name(x, 0) if x == layer else x: kept for x, kept in self.latest.items()}
                self.latest.clear()
                self.latest.update(renamed)
            name = call_name(layer, measurement.call) if layer in self._repeated else layer
            self.latest[name] = without_call(measurement)

    def _continue(self, measurement: Measurement) -> None:
        """Find out whether the call continues one of the forward before."""
        query, key, forward = measurement.query, measurement.key, measurement.forward
        if query is None or key is None or forward is None or self.queries_split:
            return
        known = self._decoding.setdefault((measurement.layer, measurement.call), Decoding())
        if known.continues(forward, query.shape[0], query.shape[2], key.shape[2]):
            measurement.context = measurement.context._replace(continues=True)

    def _succeed(self, layer: str, state: LayerState, how: str) -> None:
        """Note how a call was measured, and that measuring the layer works again if it failed before."""
        self._measured[layer] = how
        if state.failures:
            if self._problems.get(layer) == state.failure:
                del self._problems[layer]
            _log.info("hnf-attention measures %s again", display_name(layer))
            state.failures = 0

    def _give_up(self, layer: str, state: LayerState, failure: Exception) -> None:
        if isinstance(failure, Unmeasurable):
            self._problems[layer] = str(failure)
            if failure.lasting:
                state.measuring_failed = state.fused_failed = True
                self._measured.pop(layer, None)
            return
        kind = type(failure).__name__
        why = f"{kind}: {failure}"
        if not state.failure and kind not in self._said:  # one cause fails in many layers, again and again
            self._said.add(kind)
            _log.warning("hnf-attention could not measure %s and tries again: %s", display_name(layer), why)
        state.rest()
        state.failure = self._problems[layer] = f"measuring failed: {why}"
        self._measured.pop(layer, None)

    @property
    def failing(self) -> dict[str, str]:
        """The layers whose measuring failed at the last attempt and is tried again, and why."""
        return {layer: state.failure for layer, state in list(self._layers.items()) if state.failures}
