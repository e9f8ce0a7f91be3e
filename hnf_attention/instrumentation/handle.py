"""`instrument(model)`: measure every attention that a model runs, without changing what it computes."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..engine import api, engines
from ..names import display_name, named_modules
from ..reference.options import Options
from ..reference.sampling import effective_period
from ..statistics.rows import RowStats
from ..tracing import unwatched
from . import observer, scores
from .call import EAGER, AttentionCall, Unmeasurable
from .compiled import operators
from .coverage import Coverage, is_attention, unreached
from .interceptors import flex, multihead, sdpa, softmax
from .measurement import Measurement
from .patches import Patch

MODES = ("auto", "fused", "probe")
_log = logging.getLogger("hnf_attention")


@dataclass
class _Layer:
    """What has been learnt about one layer while it ran."""

    checked: bool = False  # its own attention function was compared with ours
    fused_failed: bool = False
    measuring_failed: bool = False
    described: set[str] = field(default_factory=set)  # where calls here or inside had q and k
    probed: int = 0  # calls so far: the phase of the next sample


class Instrumentation:
    """The handle of an instrumented model; made by `instrument`.

    It measures as long as it lives: `restore()`, leaving its `with` block, or dropping the last
    reference to it puts everything back. It never keeps the model alive.

    measuring: set it to False and the model runs its own attention, at the cost of one branch. It must
        not change between a forward and its backward where activation checkpointing is used.
    on_measure: called with a `Measurement` for each attention call (never for the second forward of a
        checkpoint). While it is None, the last measurement of each layer is kept in `latest`.
    """

    def __init__(self, model: nn.Module, mode: str, strict: bool, sample: int | None):
        self.mode = mode
        self.sample = sample
        self.on_measure: Callable[[Measurement], None] | None = None
        self.latest: dict[str, Measurement] = {}
        self._layers: dict[str, _Layer] = {}
        self._measured: dict[str, str] = {}
        self.slowed: set[str] = set()  # modules that were told that their inference fast path is off
        modules = dict(named_modules(model))
        self._problems = flex.unreachable(modules)
        self._attention = weakref.WeakValueDictionary(
            {name: module for name, module in modules.items() if is_attention(module)}
        )
        patches: list[Patch] = []
        references = [weakref.ref(module) for module in modules.values()]
        hook = _Judge(model, weakref.ref(self)).handle if strict else None
        self._restore = weakref.finalize(self, _restore, references, patches, hook, id(self))
        self._restore.atexit = False
        every = modules.values()
        patches += [*sdpa.install(every), *multihead.install(), *softmax.install(every), *flex.install(every)]
        if "transformers.modeling_utils" in sys.modules:  # a model of theirs is not there without
            from .interceptors import transformers

            patches += transformers.install(every)
        observer.register(modules, self)
        operators.mark_compiled(every)
        # A graph of before says nothing again.
        self.slowed |= {name for name, module in modules.items() if module in operators.slowed}
        self._problems |= {
            x: why for x, module in modules.items() if (why := operators.unreached.get(module))
        }
        self.measuring = True

    @property
    def measuring(self) -> bool:
        return self._measuring

    @measuring.setter
    def measuring(self, value: bool) -> None:
        self._measuring = bool(value)
        if value and self._restore.alive:
            observer.measuring.add(id(self))
        else:
            observer.measuring.discard(id(self))

    def restore(self) -> None:
        """Put the model and every replaced function back exactly; safe to call twice."""
        self._restore()

    def __enter__(self) -> Instrumentation:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    @property
    def coverage(self) -> Coverage:
        """What is measured so far, what is not, and why. Judge it after a forward pass."""
        attention = dict(self._attention)
        problems = {
            name: why
            for name, why in self._problems.items()
            if why != operators.SHARED or name not in self._measured
        }
        measured = {name: how + self._note(name) for name, how in self._measured.items()}
        return Coverage(measured, unreached(attention, self._measured) | problems)

    def _note(self, name: str) -> str:
        slowed = any(name == outer or name.startswith(f"{outer}.") or not outer for outer in self.slowed)
        return ", inference fast path off" if slowed else ""

    def require_measured(self) -> None:
        """Raise RuntimeError, with the coverage report, where nothing at all has been measured."""
        if not self._measured:
            raise RuntimeError(str(self.coverage))

    def note(self, name: str, problem: str) -> None:
        """List a layer, or calls of it, as not measured."""
        self._problems[name] = problem

    def attend(self, name: str, build: Callable[[], AttentionCall], original: Callable[[], Any]) -> Any:
        """Run one attention call of layer `name`, and measure it.

        build: makes the call's description; called at most once, before `original`.
        original: the model's own attention.
        Returns what `original` returns, or in its place our output in the same layout. Only errors of
        the model's own attention come out; any other fault ends the measuring of this layer.
        """
        layer = self._layers.get(name)
        if layer is None:
            layer = self._layers[name] = _Layer()
        thread = observer.thread
        before, thread.suspended = thread.suspended, True
        try:
            if torch._C._current_graph_task_id() != -1:  # inside backward: a checkpoint's second forward
                return self._repeat(layer, build, original)
            if layer.measuring_failed and (layer.fused_failed or self.mode == "probe"):
                return original()
            return self._run(name, layer, build, original)
        finally:
            thread.suspended = before

    def _run(
        self, name: str, layer: _Layer, build: Callable[[], AttentionCall], original: Callable[[], Any]
    ) -> Any:
        result = call = options = rows = failure = None
        done = fused = False
        try:
            with unwatched():
                call = build()
                if call.check is not None and not layer.checked:
                    layer.checked = call.check(call)
                call.cast()
                options = call.validated()
            fused = not layer.fused_failed and self._takes(call)
            if fused:
                output, rows = api.attend(call.query, call.key, call.value, options, detached=True)
                result, done = call.from_output(output), True
        except Exception as error:  # of whatever kind: the model's own attention still has to run
            failure = error.with_traceback(None)
        if not done:
            result = original()
            layer.fused_failed |= failure is not None and not isinstance(failure, Unmeasurable)
        if failure is None and not layer.measuring_failed:
            try:
                with unwatched():
                    self._measure(name, call, options, rows)
            except Exception as error:  # the monitor never ends a run
                failure = error.with_traceback(None)
            else:
                self._measured[name] = self._describe(call, fused)
        if failure is not None:
            self._give_up(name, layer, failure)
        return result

    def _repeat(self, layer: _Layer, build: Callable[[], AttentionCall], original: Callable[[], Any]) -> Any:
        """The same path as the forward before it took, so that the same tensors are saved; no record.

        No error is caught but our own: the recomputation of a checkpoint ends by raising one.
        """
        if self.mode == "probe" or layer.fused_failed:
            return original()
        try:
            with unwatched():
                call = build()
                call.cast()
        except Unmeasurable:
            return original()
        if not self._takes(call):
            return original()
        output, _ = api.attend(call.query, call.key, call.value, call.validated(), detached=True)
        return call.from_output(output)

    def _wants_fused(self, call: AttentionCall) -> bool:
        covered = call.prefer_fused and engines.kernels_cover(call.query, call.value)
        return self.mode == "fused" or (self.mode == "auto" and covered)

    def _takes(self, call: AttentionCall) -> bool:
        """Whether our attention computes this call's output: from properties of the call alone."""
        return call.not_fused is None and self._wants_fused(call)

    def _describe(self, call: AttentionCall, fused: bool) -> str:
        if fused:
            return f"fused ({call.interceptor})"
        held_back = call.not_fused is not None and self._wants_fused(call)
        share = "" if self.sample in (None, 1) else f" of 1/{self.sample} of the rows"
        return f"probe{share}{f': {call.not_fused}' if held_back else ''} ({call.interceptor})"

    def _measure(self, name: str, call: AttentionCall, options: Options, rows: RowStats | None) -> None:
        if rows is None:
            measurement = self._probe(name, call, options)
        else:
            measurement = Measurement(name, rows, call.query, call.key, options)
        if call.place not in self._layers[name].described:
            self._describes(name, call.place)
        self._deliver(measurement)

    def _describes(self, name: str, place: str) -> None:
        """Note at the layer and all modules around it that calls are measured with queries and keys."""
        for outer in (name, *(name[:i] for i, letter in enumerate(name) if letter == "."), ""):
            self._layers.setdefault(outer, _Layer()).described.add(place)

    def observe(
        self, name: str, interceptor: str, build: Callable[[], Measurement], place: str = EAGER
    ) -> None:
        """Take in what `build` measured of an attention that ran by itself; no error comes out.

        place: where it ran. A softmax beside other attention of the module, in the same place, is none.
        """
        layer = self._layers.setdefault(name, _Layer())
        # What is beside a call of its attention is something else.
        if layer.measuring_failed or place in layer.described:
            return
        try:
            with unwatched():
                self._deliver(build())
        except Exception as error:  # the monitor never ends a run
            self._give_up(name, layer, error.with_traceback(None))
        else:
            self._measured[name] = f"probe ({interceptor})"

    def _deliver(self, measurement: Measurement) -> None:
        if self.on_measure is None:
            measurement.release()
            self.latest[measurement.layer] = measurement
        else:
            self.on_measure(measurement)

    @torch.no_grad()
    def _probe(self, name: str, call: AttentionCall, options: Options) -> Measurement:
        """Measure all rows or the next sample of them."""
        layer = self._layers[name]
        phase, layer.probed = layer.probed, layer.probed + 1
        period = 1 if self.sample is None else effective_period(self.sample, call.query.shape[2])
        if call.modify is not None:
            return scores.modified(name, call, options, period, phase)
        if period == 1:
            rows = api.attend(call.query, call.key, None, options)[1]
        else:
            rows = api.attend_sample(call.query, call.key, options, (period, phase))
        return Measurement(name, rows, call.query, call.key, options, period)

    def _give_up(self, name: str, layer: _Layer, failure: Exception) -> None:
        if isinstance(failure, Unmeasurable):
            self._problems[name] = str(failure)
            if not failure.lasting:
                return
        else:
            self._problems[name] = f"measuring failed: {type(failure).__name__}: {failure}"
            _log.warning("hnf-attention stopped measuring %s: %s", display_name(name), self._problems[name])
        layer.measuring_failed = True
        layer.fused_failed |= isinstance(failure, Unmeasurable)
        self._measured.pop(name, None)


class _Judge:
    """A hook of the model's that judges the coverage once, after the first complete forward that was measured.

    It is copied and pickled with the model: what comes of that does nothing, and needs nothing of ours.
    """

    def __init__(self, model: nn.Module, instrumentation: weakref.ref):
        self._root, self._instrumentation = weakref.ref(model), instrumentation
        self.handle = model.register_forward_hook(self)

    def __call__(self, module: nn.Module, *_: object) -> None:
        if torch.compiler.is_compiling():  # a graph raises nothing
            return
        instrumentation = self._instrumentation()
        # A shallow copy of the model shares this hook; it is not the model that was instrumented.
        if instrumentation is None or module is not self._root() or not instrumentation.measuring:
            return
        self.handle.remove()
        coverage = instrumentation.coverage
        if coverage.not_measured or not coverage.measured:
            raise RuntimeError(str(coverage))

    def __reduce__(self) -> tuple[Callable, tuple]:
        return getattr, (nullcontext(), "__exit__")


def _restore(modules: list[weakref.ref], patches: list[Patch], hook: Any, identity: int) -> None:
    observer.measuring.discard(identity)
    for reference in modules:
        module = reference()
        if module is not None:
            observer.forget(module)
            operators.unmark(module)
    while patches:
        patches.pop().release()
    if hook is not None:
        hook.remove()


def instrument(
    model: nn.Module, mode: str = "auto", strict: bool = False, sample: int | None = None
) -> Instrumentation:
    """Measure every attention call of `model`: exact softmax statistics per batch, head and query.

    Reached are Hugging Face models (attn_implementation "sdpa", "eager" or "flex_attention") and everything that
    calls `torch.nn.functional.scaled_dot_product_attention` or `flex_attention`, each call under the name of the
    innermost module running. What is not reached is listed in `.coverage`. Nothing of the model is changed: no config,
    no module, no state dict; `.restore()` ends it, and so does dropping the returned handle.
    A model may be compiled before or after; its graphs are probed, in every mode.

    mode: "probe" leaves the model's attention alone and measures beside it, bit-identical outputs.
        "fused" computes the output in the same pass as the statistics, wherever that is the same
        function: not with dropout, not with a mask that requires a gradient, not where attention
        weights are asked for, not for flex_attention (those calls are probed, and `.coverage` says
        so). A row whose keys are all hidden by a finite mask gets output 0, where an eager softmax
        averages all values: such rows are padding. "auto" takes fused for SDPA calls without a user mask
        that the GPU kernels cover, else probe: under a mask a probe beside SDPA is the cheaper way.
    strict: after the first complete forward, raise RuntimeError if any attention was not measured, or
        none at all. A forward that is part of a compiled graph is not judged.
    sample: probe one block of 64 query rows of every `sample` (of all of them, in a sequence with fewer);
        each call of a layer takes the next blocks, so that `sample` calls cover every row. Maxima are
        lower bounds then. Fused calls have the statistics of all rows at hand and keep them all.

    An eager attention function of transformers is compared once per layer, on a few rows in double
    precision, with what is measured; one that computes something else is listed, not measured.

    Raises TypeError if `model` is no nn.Module, ValueError for a wrong mode or sample, or a model of
    which any module is instrumented already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module, got {type(model).__name__}")
    if mode not in MODES:
        raise ValueError(f"expected mode in {MODES}, got {mode!r}")
    if sample is not None and (isinstance(sample, bool) or not isinstance(sample, int) or sample < 1):
        raise ValueError(f"expected sample to be None or an int >= 1, got {sample!r}")
    for name, module in named_modules(model):
        if observer.owner(module) is not None:
            raise ValueError(
                f"expected a model that is not instrumented, got one whose module {name!r} is; "
                "call restore() on its Instrumentation, monitor or analyzer first"
            )
    return Instrumentation(model, mode, strict, sample)
