"""`instrument(model)`: measure every attention call that a model makes, without changing what it computes."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from ..names import named_modules
from . import observer
from .compiled import layers, tracer
from .coverage import Coverage, is_attention, unreached
from .interceptors import flex, multihead, sdpa, softmax
from .measurer import Measurer
from .padding import checked_query_mask
from .patches import Patch
from .strict import CoverageJudge

MODES = ("auto", "fused", "probe")


def instrument(
    model: nn.Module, mode: str = "auto", strict: bool = False, sample: int | None = None
) -> Instrumentation:
    """Measure every attention call of `model`: exact softmax statistics per batch, head and query.

    Reached are Hugging Face models (attn_implementation "sdpa", "eager" or "flex_attention") and everything that
    calls `torch.nn.functional.scaled_dot_product_attention` or `flex_attention`. Each call has the name of the
    innermost module that is running. What is not reached is listed in `.coverage`. Nothing of the model is changed: no
    config, no module, no state dict. `.restore()` ends it, and so does dropping the returned handle.
    A model may be compiled before or after; its graphs are probed, in every mode.

    mode: "probe" leaves the model's attention alone and measures beside it, with bit-identical outputs.
        "fused" computes the output in the same pass as the statistics, wherever that is the same function. Calls with
        dropout, with a mask that requires a gradient, with attention weights to return, and of flex_attention are
        probed, and `.coverage` says so. A row whose keys are all hidden by a finite mask gets output 0, where an eager
        softmax averages all values: such rows are padding.
        "auto" takes fused for SDPA calls without a user mask that the GPU kernels cover, else probe: under a mask, a
        probe beside SDPA is the cheaper way.
    strict: after the first complete forward, raise RuntimeError if any attention was not measured, or none at all.
        A forward that is part of a compiled graph is not judged.
    sample: probe one block of 64 query rows of every `sample`, or of all of them in a shorter sequence. Each call of a
        layer takes the next blocks, so that `sample` calls cover every row. Maxima are then lower bounds. Fused calls
        keep the statistics of all rows.

    An eager attention function of transformers is compared once per layer, on a few rows in double precision, with
    what is measured. One that computes something else is listed, not measured.

    Raises TypeError if `model` is no nn.Module, ValueError for a wrong mode or sample, and ValueError for a model with
    a module that is instrumented already.
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


class Instrumentation(Measurer):
    """The handle of an instrumented model, made by `instrument`.

    It measures as long as it lives: `restore()`, leaving its `with` block, or dropping the last reference to it puts
    everything back. It never keeps the model alive.

    measuring: while it is False, the model runs its own attention, at the cost of one branch a call. With activation
        checkpointing it must not change between a forward and its backward.
    on_measure: gets a `Measurement` for each attention call (never for the second forward of a checkpoint). While it is
        None, `latest` keeps the last measurement of each layer.
    """

    def __init__(self, model: nn.Module, mode: str, strict: bool, sample: int | None):
        super().__init__(mode, sample)
        modules = dict(named_modules(model))
        self._attention = weakref.WeakValueDictionary(
            {name: module for name, module in modules.items() if is_attention(module)}
        )
        patches: list[Patch] = []
        references = [weakref.ref(module) for module in modules.values()]
        hook = CoverageJudge(model, weakref.ref(self)).handle if strict else None
        self._restore = weakref.finalize(self, _restore, references, patches, hook, id(self))
        self._restore.atexit = False
        patches += _install(modules.values())
        observer.register(modules, self)
        layers.mark_compiled(modules.values())
        self._problems |= flex.unreachable(modules) | tracer.unreached_before(modules)
        self._slowed |= tracer.slowed_before(modules)
        self.measuring = True

    def __repr__(self) -> str:
        state = ("measuring" if self.measuring else "paused") if self._restore.alive else "restored"
        return f"Instrumentation(mode={self.mode!r}, sample={self.sample}, {state}, {self.coverage!r})"

    @property
    def query_mask(self) -> Tensor | None:
        """Which queries of this thread's calls are judged: boolean (B, M), True for judged; None for all but padding.

        Padding that attention masks show is left out by itself. Set this to leave out others, before the forward that
        it belongs to. Calls of another shape are judged as without it. Raises TypeError or ValueError for a mask that
        is no boolean or integer tensor of two dimensions.
        """
        return self.padding.query_mask

    @query_mask.setter
    def query_mask(self, mask: Tensor | None) -> None:
        self.padding.query_mask = checked_query_mask(mask)

    @property
    def measuring(self) -> bool:
        return self._measuring

    @measuring.setter
    def measuring(self, value: bool) -> None:
        self._measuring = bool(value)
        if value and self._restore.alive:
            observer.active.add(id(self))
        else:
            observer.active.discard(id(self))

    def restore(self) -> None:
        """Put the model and every replaced function back exactly. A second call does nothing."""
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
            if why != tracer.SHARED or name not in self._measured
        }
        measured = {name: how + self._slowed_note(name) for name, how in self._measured.items()}
        return Coverage(measured, unreached(attention, self._measured) | problems)

    def _slowed_note(self, name: str) -> str:
        slowed = any(name == outer or name.startswith(f"{outer}.") or not outer for outer in self._slowed)
        return ", inference fast path off" if slowed else ""

    def require_measured(self) -> None:
        """Raise RuntimeError, with the coverage report, if nothing at all has been measured."""
        if not self._measured:
            raise RuntimeError(str(self.coverage))


def _install(modules: Collection[nn.Module]) -> list[Patch]:
    """Put all interceptors in place."""
    patches = [
        *sdpa.install(modules),
        *multihead.install(),
        *softmax.install(modules),
        *flex.install(modules),
    ]
    if (
        "transformers.modeling_utils" in sys.modules
    ):  # the model is none of transformers' before it is imported
        from .interceptors import transformers

        patches += transformers.install(modules)
    return patches


def _restore(modules: list[weakref.ref[nn.Module]], patches: list[Patch], hook: Any, identity: int) -> None:
    observer.active.discard(identity)
    for reference in modules:
        module = reference()
        if module is not None:
            observer.forget(module)
            layers.unmark(module)
    while patches:
        patches.pop().release()
    if hook is not None:
        hook.remove()
