"""`instrument(model)`: measure every attention call that a model makes, without changing what it computes."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..names import named_modules
from . import observer
from .compiled import tracer
from .coverage import Coverage, is_attention, unreached
from .evidence import UNMET
from .graph_reader import GraphReader
from .interceptors import (
    flash_attn,
    flex,
    megatron,
    multihead,
    products,
    registered,
    sdpa,
    softmax,
    transformer_engine,
    varlen,
    xformers,
)
from .measurer import MOST_CALLS, Measurer
from .padding import checked_query_mask
from .patches import Patch, all_or_none, release_all
from .strict import CoverageJudge
from .watched import Watched

MODES = ("auto", "fused", "probe")
_log = logging.getLogger("hnf_attention")


def instrument(
    model: nn.Module,
    mode: str = "probe",
    strict: bool = False,
    sample: int | None = None,
    attention_classes: Iterable[str | type[nn.Module]] = (),
    holder: Any = None,
) -> Instrumentation:
    """Measure every attention call of `model`: exact softmax statistics per batch, head and query.

    Reached are Hugging Face models (attn_implementation "sdpa", "eager", "flex_attention", "flash_attention_2" to "4")
    and everything that calls `torch.nn.functional.scaled_dot_product_attention` or `flex_attention`, the libraries of
    docs/libraries.md, functions of `register_interceptor`, and attention that is written out: a softmax over the last
    dimension of a product of queries and keys, if the result meets values. Each call has the name of the innermost
    module that is running. What is not reached is listed in `.coverage`. Nothing of the model is changed: no config, no
    module, no state dict. (An attribute that holds a function of a library holds ours meanwhile.) `.restore()` ends it,
    and so does dropping the returned handle. A model may be compiled before or after; its graphs are probed, in every
    mode.

    mode: "probe" leaves the model's attention alone and measures beside it, with bit-identical outputs.
        "fused" computes the output in the same pass as the statistics, wherever that is the same function. Calls with
        dropout, with a mask that requires a gradient, with attention weights to return, and of flex_attention are
        probed, and `.coverage` says so. A row whose keys are all hidden by a finite mask gets output 0, where an eager
        softmax averages all values: such rows are padding.
        "auto" takes fused for SDPA calls without a user mask, on cards and for calls where fused was measured to be
        cheaper (docs/limits.md, "Cards"), else probe. `.coverage` gives the reason.
    strict: after the first complete forward, raise RuntimeError if any attention was not measured, or none at all.
        A forward that is part of a compiled graph is not judged.
    sample: probe one block of 64 query rows of every `sample`, or of all of them in a shorter sequence. Each call of a
        layer takes the next blocks, so that `sample` calls cover every row. Maxima are then lower bounds. Fused calls
        keep the statistics of all rows.
    attention_classes: classes of the model's modules, or their names. Each softmax over the last dimension in such a
        module is measured, whatever its scores come from and whatever its result meets.
    holder: for tools that are built on this: the object whose `restore()` ends the handle, held weakly.

    A model has one handle of each kind: one of `instrument`, one for each class of holder. A new one takes over from
    an old one of its kind, which is restored, as a log line says: a notebook cell can be run twice. Handles of
    different kinds measure side by side. All but one of them have to be in mode "probe".

    An eager attention function of transformers is compared once per layer, on a few rows in double precision, with
    what is measured. One that computes something else is listed, not measured.

    Raises TypeError if `model` is no nn.Module or a class is none of modules. Raises ValueError for a wrong mode or
    sample, for a class that no module of the model has, for a second handle that would compute outputs, and for a model
    that shares modules with another one that is instrumented.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module, got {type(model).__name__}")
    if mode not in MODES:
        raise ValueError(f"expected mode in {MODES}, got {mode!r}")
    if sample is not None and (isinstance(sample, bool) or not isinstance(sample, int) or sample < 1):
        raise ValueError(f"expected sample to be None or an int >= 1, got {sample!r}")
    classes = _classes(model, attention_classes)
    watched = Watched.of(model)
    for member in watched.members:
        if type(member.holder) is (Instrumentation if holder is None else type(holder)):
            _log.warning(
                "hnf-attention: a new %s of this model takes over from the one before", _kind(holder)
            )
            member.holder.restore()
            member.restore()
        elif mode != "probe" and member.mode != "probe":
            raise ValueError(
                f"expected mode='probe' beside {_kind(member.holder)} in mode {member.mode!r}, got {mode!r}: "
                "one of them can compute the model's outputs"
            )
    return Instrumentation(model, mode, strict, sample, classes, holder)


def _kind(holder: Any) -> str:
    return Instrumentation.__name__ if holder is None else type(holder).__name__


def _classes(model: nn.Module, asked: Iterable[str | type[nn.Module]]) -> tuple[type[nn.Module], ...]:
    """The classes of the model's modules that these classes and names mean."""
    if isinstance(asked, str) or not isinstance(asked, Iterable):
        raise TypeError(f"expected attention_classes to be a list of classes and names, got {asked!r}")
    found: list[type[nn.Module]] = []
    there = {type(module) for _, module in named_modules(model)}
    for one in asked:
        if not isinstance(one, str) and not (isinstance(one, type) and issubclass(one, nn.Module)):
            raise TypeError(f"expected attention_classes of nn.Module classes and names, got {one!r}")
        these = [
            cls for cls in there if (cls.__name__ == one if isinstance(one, str) else issubclass(cls, one))
        ]
        if not these:
            raise ValueError(
                f"expected attention_classes of the model's modules, got {one!r}, which it has none of"
            )
        found += these
    return tuple(found)


class Instrumentation(Measurer):
    """The handle of an instrumented model, made by `instrument`.

    It measures as long as it lives: `restore()`, leaving its `with` block, or dropping the last reference to it puts
    everything back. It never keeps the model alive.

    measuring: while it is False, the model runs its own attention, at the cost of one branch a call. With activation
        checkpointing it must not change between a forward and its backward.
    on_measure: gets a `Measurement` for each attention call (never for the second forward of a checkpoint). While it is
        None, `latest` keeps the last measurement of each layer. A layer that is called several times in one forward has
        a name for each call there: "block#0", "block#1", ...
        The last name, "block#15", is that of all further calls.
    on_forward_begin: gets the `Forward` of the whole model when it begins.
    on_forward_end: gets it when it has returned or raised.
    graphs: reads what compiled graphs measure by themselves, as CUDA graphs have to; `on_measure` does not get those
        calls. None while each call has to be delivered. It has no effect while another handle measures the model, too,
        or some queries are left out by `query_mask`.
    keeping: while it is True, calls under grad that are not measured are kept until their forward ends.
    on_kept: gets them then, as a `KeptForward`. It gets a call at once whose tensors autograd does not save. The
        tensors are the model's own: whoever keeps one keeps memory.

    All of them are called in the thread that runs the model, by one thread at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        mode: str,
        strict: bool,
        sample: int | None,
        attention_classes: tuple[type[nn.Module], ...],
        holder: Any,
    ):
        self._keeping = False
        self._graphs: GraphReader | None = None
        watched = Watched.of(model)
        super().__init__(mode, sample, attention_classes, watched.forwards)
        self._watched = watched  # which would not live without its handles
        self._holder = None if holder is None else weakref.ref(holder)
        self._attention: weakref.WeakValueDictionary[str, nn.Module] = weakref.WeakValueDictionary()
        self._patches: list[Patch] = []
        self._hooks: list[RemovableHandle] = []
        self._restore = weakref.finalize(self, _restore, watched, self._patches, self._hooks, id(self))
        self._restore.atexit = False
        try:
            self._begin(model, strict)
        except BaseException:  # whoever keeps the error keeps this handle alive
            self._restore()
            raise

    def _begin(self, model: nn.Module, strict: bool) -> None:
        modules = self._watched.join(self)
        self._attention.update({name: module for name, module in modules.items() if is_attention(module)})
        if strict:
            self._hooks.append(CoverageJudge(model, weakref.ref(self)).handle)
        _install(modules.values(), self._patches)
        self._watched.renew_graphs()
        for library in (registered, flex, flash_attn, varlen, xformers):
            self._problems |= library.unreachable(modules)
        self._problems |= tracer.unreached_before(modules)
        self._slowed |= tracer.slowed_before(modules)
        self.measuring = True

    def __repr__(self) -> str:
        state = ("measuring" if self.measuring else "paused") if self._restore.alive else "restored"
        return f"Instrumentation(mode={self.mode!r}, sample={self.sample}, {state}, {self.coverage!r})"

    @property
    def holder(self) -> Any:
        """Whose `restore()` ends this handle: the monitor or analyzer that made it, or the handle itself."""
        holder = None if self._holder is None else self._holder()
        return self if holder is None else holder

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
        before, self.padding.query_mask = self.padding.query_mask, checked_query_mask(mask)
        if (before is None) != (mask is None) and self._graphs is not None:
            self._watched.renew_graphs()

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

    @property
    def keeping(self) -> bool:
        return self._keeping

    @keeping.setter
    def keeping(self, value: bool) -> None:
        self._keeping = bool(value)
        if value and self._restore.alive:
            observer.keeping.add(id(self))
        else:
            observer.keeping.discard(id(self))
        self._watched.renew_keeping()

    @property
    def graphs(self) -> GraphReader | None:
        return self._graphs

    @graphs.setter
    def graphs(self, reader: GraphReader | None) -> None:
        self._graphs = reader
        if self._restore.alive:
            self._watched.renew_graphs()

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
        # Copies, each made in one step of the interpreter: other threads' forwards add to the originals meanwhile.
        measured, all_problems, all_doubts = dict(self._measured), dict(self._problems), dict(self._doubts)
        slowed, attention = set(self._slowed), dict(self._attention.items())
        problems = {
            name: why for name, why in all_problems.items() if why != tracer.SHARED or name not in measured
        }
        doubts = {
            name: why for (name, kind), why in all_doubts.items() if kind != UNMET or name not in measured
        }
        remarked = {name: how + self._remarks(name, slowed) for name, how in measured.items()}
        return Coverage(remarked, unreached(attention, measured) | doubts | problems)

    def _remarks(self, name: str, all_slowed: Collection[str]) -> str:
        slowed = any(name == outer or name.startswith(f"{outer}.") or not outer for outer in all_slowed)
        remarks = ", inference fast path off" if slowed else ""
        if name in self._numerous:
            remarks += f", its calls in one forward from #{MOST_CALLS - 1} on together"
        if name in self.kept_layers.reasons:
            remarks += f", extremes at measured steps only: {self.kept_layers.reasons[name]}"
        return remarks + (", its calls in compiled graphs together" if name in self._merged else "")

    def require_measured(self) -> None:
        """Raise RuntimeError, with the coverage report, if nothing at all has been measured."""
        if not self._measured:
            raise RuntimeError(str(self.coverage))


def _install(modules: Collection[nn.Module], patches: list[Patch]) -> None:
    """Put all interceptors in place. patches: takes them in one by one, so that none is left if a later one fails."""
    installs: list[Callable[[], list[Patch]]] = [
        partial(registered.install, modules),  # first: what the user says of a function is believed
        partial(sdpa.install, modules),
        multihead.install,
        partial(softmax.install, modules),
        partial(products.install, modules),
    ]
    for library in (flex, flash_attn, varlen, xformers, transformer_engine, megatron):
        installs.append(partial(library.install, modules))
    # The model is none of transformers' before it is imported.
    if "transformers.modeling_utils" in sys.modules:
        from .interceptors import transformers

        installs.append(partial(transformers.install, modules))
    for install in installs:
        with all_or_none():
            patches += install()


def _restore(watched: Watched, patches: list[Patch], hooks: list[RemovableHandle], identity: int) -> None:
    observer.active.discard(identity)
    observer.keeping.discard(identity)
    watched.leave(identity)
    release_all(patches)
    while hooks:
        hooks.pop().remove()
