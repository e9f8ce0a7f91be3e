"""Who measures which module, and what an interceptor calls back.

An interceptor finds the module that makes a call, and with it the `Observer` that measures the module. References
here are weak: neither a model nor its observer is kept alive by being known.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from types import FrameType, MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .. import compat
from ..errors import let_out, report
from ..statistics.rows import RowStats
from ..tracing import running_modules
from .call import EAGER, AttentionCall
from .expected import Expected, Plain
from .measurement import Measurement

if TYPE_CHECKING:
    from .graph_reader import GraphReader

TRANSFORMED = "it runs inside a transform of torch.func"
_MODULE_CALL = compat.module_call_code


class Observer(Protocol):
    """Measures the attention of one model. None of its methods raises an error of its own into the model."""

    @property
    def measuring(self) -> bool:
        """Whether calls are measured now."""

    @property
    def keeping(self) -> bool:
        """Whether calls that are not measured are kept until their forward ends, for the extremes of every step."""

    def attend(self, layer: str, describe: Callable[[], AttentionCall], original: Callable[[], Any]) -> Any:
        """Run one attention call of `layer`, measure it, and return what `original()` returns or our output like it.

        describe: makes the call's description. original: the model's own attention. Each is called at most once.
        """

    def observe(
        self, layer: str, interceptor: str, measure: Callable[[], Measurement], place: str = EAGER
    ) -> None:
        """Take in what `measure()` gives of an attention that the model computed by itself, EAGER or COMPILED."""

    def left_out(self, layer: str, query: Tensor) -> Tensor | None:
        """The queries (B, H, M, D) of a call that are not judged, boolean (B, M); None for none."""

    def note(self, layer: str, reason: str) -> None:
        """List `layer`, or some of its calls, as not measured."""

    def note_slowed(self, layer: str) -> None:
        """Say in the coverage that `layer` gave up PyTorch's inference fast path to be measured."""

    def doubt(self, layer: str, kind: str, reason: str | None) -> None:
        """List a softmax of `layer` as not measured for this reason, until None takes back the doubt of this kind."""

    def is_named(self, module: nn.Module) -> bool:
        """Whether the user says that each softmax of this module over its last dimension is attention."""


class ModelObserver(Observer, Protocol):
    """The observer of a model's modules, which also keeps calls."""

    @property
    def graph_reader(self) -> GraphReader | None:
        """Who reads what compiled graphs measure by themselves; None where each call has to be delivered."""

    @property
    def in_forward(self) -> bool:
        """Whether this thread runs a forward of the model that was told of."""

    def note_graphed(self, layer: str, interceptor: str, merged: bool) -> None:
        """Say in the coverage that compiled graphs measure `layer` by themselves.

        merged: its calls in one forward are not told apart.
        """

    def note_failed(self, layer: str, reason: str) -> None:
        """List `layer` as not measured by compiled graphs, also where nobody measures now."""

    def note_ungraphed(self, layer: str, reason: str) -> None:
        """Say in the coverage why compiled graphs take no extremes of calls of `layer`."""

    def keep(
        self,
        layer: str,
        invocation: Invocation | None,
        describe: Callable[[], AttentionCall],
        plain: Plain | None,
        output: Any,
    ) -> None:
        """Keep a call of `layer` that gave `output`. No error comes out.

        invocation: of the layer's module, None if it is not the innermost one that runs. plain: the call in short.
        """


#: ids of the observers that measure now, and of those that keep calls. While both are empty, an interceptor goes to the
#: original at once.
active: set[int] = set()
keeping: set[int] = set()
_registry: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[ModelObserver], str]] = (
    weakref.WeakKeyDictionary()
)


class Owner(NamedTuple):
    """A module with its observer. layer: the module's name in the instrumented model."""

    observer: ModelObserver
    layer: str
    module: nn.Module


class Heads(NamedTuple):
    """Numbers of query and key heads that a model gave to transformers, which may rearrange them for PyTorch."""

    owner: Owner | None
    query: int
    key: int


class Invocation:
    """One call of a registered module, while it runs: what is known of it so far.

    numbers: its number among the invocations of its forward, by layer: its own, and those in a compiled graph inside.
    forward: the forward that begins here, if this module was called without the model around it.
    evidence: what the interceptor of softmax knows of the products and softmaxes in it.
    """

    __slots__ = ("evidence", "forward", "numbers")

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.forward: Any = None
        self.evidence: Any = None


class _Thread(threading.local):
    """What is known of the call that runs on this thread. Whoever sets an attribute puts it back.

    suspended: the call is measured already, and attention inside is part of it.
    heads: of the scaled_dot_product_attention inside, where transformers makes it.
    receiver: takes (original, *arguments) of a scaled_dot_product_attention inside, in place of any observer.
    expected: the calls that the forward of a model which keeps them is expected to make.
    slot_rows: statistics of the last scaled_dot_product_attention that this project computed in place of PyTorch's
        flash kernel, which leaves them here. Whoever wants those of a call sets this to None before it.
    """

    suspended = False
    heads: Heads | None = None
    receiver: Callable[..., Any] | None = None
    expected: Expected | None = None
    slot_rows: RowStats | None = None


thread = _Thread()


def register(modules: dict[str, nn.Module], observer: ModelObserver) -> None:
    """Give these modules, by their names in the model, to `observer`."""
    reference = weakref.ref(observer)
    for name, module in modules.items():
        _registry[module] = (reference, name)


def forget(module: nn.Module) -> None:
    """Take the module from its observer."""
    _registry.pop(module, None)


def owner(module: nn.Module) -> Owner | None:
    """The module's owner; a copy of the module has none."""
    entry = _registry.get(module)
    if entry is None:
        return None
    observer = entry[0]()
    return None if observer is None else Owner(observer, entry[1], module)


def modules() -> list[nn.Module]:
    """The modules that have an observer, of all models."""
    return list(_registry)


def modules_of(observer: Observer) -> list[nn.Module]:
    """The modules of an observer that are still alive."""
    return [module for module, (reference, _) in list(_registry.items()) if reference() is observer]


def run(
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    describe: Callable[..., AttentionCall],
    find: Callable[..., Owner | None] | None = None,
    plain_of: Callable[..., Plain | None] | None = None,
) -> Any:
    """Run an intercepted attention call `original(*args, **kwargs)`, measured where somebody measures it.

    describe: makes the call's description from the same arguments. find: as for `measuring_owner`. plain_of: says the
    call in short, None for a call that only the description says.
    """
    owner, wanted, expected = None, None, None
    try:
        # A step of which nothing is wanted pays for these two branches alone.
        owner = measuring_owner(find, *args, **kwargs) if active else None
        if keeping and not repeats():
            expected = thread.expected if owner is None else None
            if expected is None or not expected.begins(_is_caller, _short(plain_of, args, kwargs)):
                expected, wanted = None, keeping_owner(find, args, kwargs)
    except Exception as error:  # the monitor never ends a run
        note_fault(error)
        owner, wanted, expected = None, None, None
    if owner is not None:
        described = partial(describe, *args, **kwargs)
        output = owner.observer.attend(owner.layer, described, partial(original, *args, **kwargs))
    elif wanted is None and expected is None:
        return original(*args, **kwargs)
    else:
        output = alone(original, args, kwargs)
    if expected is not None:
        try:
            if expected.take(output):
                return output
            expected.leave()
            wanted = keeping_owner(find, args, kwargs)
        except Exception as error:
            note_fault(error)
            return output
    if wanted is not None:
        described = partial(describe, *args, **kwargs)
        wanted[0].observer.keep(wanted[0].layer, wanted[1], described, _short(plain_of, args, kwargs), output)
    return output


def note_fault(error: Exception) -> None:
    """Log that looking at a call failed, and list its layer: the model's own attention goes on."""
    report("a call could not be looked at, and is not measured", error)
    with suppress(Exception):  # what failed may be the search for the layer
        owner = running_owner()
        if owner is not None:
            owner.observer.note(owner.layer, f"looking for attention failed: {type(error).__name__}: {error}")


def alone(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the call; attention inside is part of it."""
    thread.suspended = True
    try:
        return original(*args, **kwargs)
    finally:
        thread.suspended = False


def _is_caller(module: nn.Module | None) -> bool:
    """Whether this module makes the call: as a layer of transformers, or as the innermost module that runs."""
    if thread.heads is not None and thread.heads.owner is not None:
        return thread.heads.owner.module is module
    return module is not None and next(running_modules(), None) is module


def repeats() -> bool:
    """Whether the call is part of one that is seen already, or the second forward of a checkpoint, or traced."""
    seen = thread.suspended or thread.receiver is not None
    return seen or compat.running_backward() != -1 or bool(compat.jit_trace())


def keeping_owner(
    find: Callable[..., Owner | None] | None = None,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Owner, Invocation | None] | None:
    """Who keeps the call made here, and the invocation of its module if that is the innermost one that runs."""
    nearest = next(_running(), None)
    innermost = None if nearest is None else nearest[0]
    owner = innermost if find is None else find(*args, **kwargs)
    if owner is None or not owner.observer.keeping:
        return None
    if nearest is None or nearest[0].layer != owner.layer:
        return owner, None
    return owner, compat.kept_in(nearest[1], Invocation)


def _short(
    plain_of: Callable[..., Plain | None] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Plain | None:
    try:
        return None if plain_of is None else plain_of(*args, **kwargs)
    except Exception as error:
        # A function of the user's own may take other arguments: the description says it then.
        let_out(error)
        return None


def measuring_owner(
    find: Callable[..., Owner | None] | None = None, /, *args: Any, **kwargs: Any
) -> Owner | None:
    """The owner that measures the attention called here, None where nobody does.

    find: finds the owner from the call's arguments; None takes the running module's owner.
    """
    if not active or thread.suspended or thread.receiver is not None or compat.jit_trace():
        return None
    found = running_owner() if find is None else find(*args, **kwargs)
    return found if found is not None and found.observer.measuring else None


def wanting_owner(find: Callable[..., Owner | None], /, *args: Any, **kwargs: Any) -> Owner | None:
    """The owner that measures or keeps the attention called here, None where nobody does. find: finds the owner."""
    owner = measuring_owner(find, *args, **kwargs)
    if owner is not None or not keeping:
        return owner
    owner = find(*args, **kwargs)
    return owner if owner is not None and owner.observer.keeping else None


def list_transformed(find: Callable[..., Owner | None] | None = None, /, *args: Any, **kwargs: Any) -> None:
    """List the layer that makes this call if a transform of torch.func runs it: its tensors cannot be measured.

    find: as for `measuring_owner`.
    """
    compiles = torch.compiler.is_compiling() or compat.lowered_graph() is not None
    found = None if compiles else measuring_owner(find, *args, **kwargs)
    if found is not None:
        found.observer.note(found.layer, TRANSFORMED)


def running(into_graphs: bool = True) -> Iterator[tuple[Owner, Invocation]]:
    """The registered modules that are running on this thread, the innermost first, each with its invocation.

    into_graphs: False for none at all where a compiled graph makes the call.
    """
    for found, variables in _running(into_graphs):
        yield found, compat.kept_in(variables, Invocation)


def running_owner() -> Owner | None:
    """The owner of the innermost registered module that is running on this thread."""
    return next((found for found, _ in _running()), None)


def arguments(module: nn.Module) -> tuple[Any, ...]:
    """What the innermost running call of the module was given; () where it does not run."""
    for found, variables in _running():
        if found.module is module:
            return (*variables.get("args", ()), *variables.get("kwargs", {}).values())
    return ()


def running_calls() -> Iterator[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
    """The registered modules that are running, the innermost first, with what each was given by place and by name."""
    for found, variables in _running():
        yield found.module, variables.get("args", ()), variables.get("kwargs", {})


def _running(into_graphs: bool = True) -> Iterator[tuple[Owner, dict[str, Any]]]:
    """The registered modules that are running, the innermost first, each with the variables of the frame that runs it.

    Running modules are read from the Python stack, from frames of `compat.module_call_code`. Hooks would be wrong in
    the second forward of a checkpoint, in autograd's threads, and after an exception; the stack is right in all three.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _MODULE_CALL:
            variables = frame.f_locals
            found = owner(variables["self"])
            if found is not None:
                yield found, variables
        elif not into_graphs and compat.runs_graph(frame) and not _is_called_by_its_module(frame):
            return
        frame = frame.f_back


def _is_called_by_its_module(frame: FrameType) -> bool:
    """Whether the frame is the forward of a registered module, as torch.fx makes some."""
    caller = frame.f_back
    return caller is not None and caller.f_code is _MODULE_CALL and owner(caller.f_locals["self"]) is not None
