"""Forward passes of an instrumented model: which one a measured call belongs to, and which call of its layer it is.

A forward begins and ends where the model itself is called. Its class gets a `__call__` that says so, which leaves
nothing in the model, in its copies and pickles, or in a graph. Hooks of the model would be copied and pickled with it,
and they miss an exception that is no `Exception`.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import nn

from ..compat import dynamo
from . import observer
from .call import COMPILED, EAGER
from .keeping import Pending
from .measurement import Forward
from .patches import Patch
from .shared_masks import shared


@dataclass(slots=True, eq=False)
class _Pass:
    """A forward, with how many invocations of each layer it has had, and its calls that were kept."""

    forward: Forward
    invocations: dict[str, int] = field(default_factory=dict)
    pending: Pending = field(default_factory=Pending)


class _Thread(threading.local):
    """running: the forward of the whole model that this thread runs. loose: of calls with no module around them."""

    running: _Pass | None = None
    loose: _Pass | None = None


class Forwards:
    """The forward passes of one model. Threads that run it at the same time have forwards of their own.

    began: gets each forward of the whole model, and may say there which calls are expected. ended: gets it when it has
    returned or raised, and the calls that are pending.
    """

    def __init__(self, began: Callable[[Forward, Pending], None], ended: Callable[[Forward, Pending], None]):
        self._began, self._ended = began, ended
        self._numbers = count(1)
        self._thread = _Thread()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around one call of the model. A call of the model inside of its own forward is part of that forward."""
        thread = self._thread
        if thread.running is not None:
            yield
            return
        running = thread.running = self._new(ends=True)
        forward, before = running.forward, observer.thread.expected
        try:
            self._began(forward, running.pending)
            observer.thread.expected = running.pending.expected
            yield
        except BaseException:
            forward.failed = True
            raise
        else:
            forward.failed = False
        finally:
            thread.running = None
            observer.thread.expected = before
            self._ended(forward, running.pending)

    @property
    def is_running(self) -> bool:
        """Whether this thread runs a forward of the whole model."""
        return self._thread.running is not None

    def place(self, layer: str, place: str) -> tuple[Forward, int, bool]:
        """(the forward, the number of this invocation of the layer in it, whether invocations cannot be told apart).

        Asked while the call runs. Invocations are those of the layer's module, each with a frame of its own on the
        stack: several calls inside of one are calls of the same number. A compiled graph runs without such frames.
        There the nearest module around it takes their place; without one, all of a forward's are number 0.
        """
        current = self._thread.running
        own: observer.Invocation | None = None
        nearest: observer.Invocation | None = None
        outermost: observer.Invocation | None = None
        for owner, running in observer.running():
            nearest = nearest or running
            outermost = running
            if own is None and owner.layer == layer:
                own = running
            if current is not None and (own is not None or place == COMPILED):
                break
        if current is None:
            current = self._loose(layer) if outermost is None else self._direct(outermost)
        invocation, seen = own or nearest, current.invocations
        if invocation is None:
            merged = layer in seen
            seen[layer] = 1
            return current.forward, 0, merged
        merged = own is None and place == COMPILED and layer in invocation.numbers
        return current.forward, _numbered(layer, invocation, seen), merged

    def kept(self, layer: str, invocation: observer.Invocation | None) -> tuple[Forward, int, Pending | None]:
        """(the forward, the number of this invocation of the layer in it, where its calls are kept).

        invocation: of the layer's module; None to search for it. The last is None where no end of the forward is told.
        """
        current = self._thread.running
        if current is None or invocation is None:
            forward, number, _ = self.place(layer, EAGER)
            return forward, number, None if current is None else current.pending
        expected = current.pending.expected
        if expected is not None:  # each of these calls was its layer's only one
            for signature in expected.whole.signatures[: len(expected.taken)]:
                current.invocations.setdefault(signature.layer, 1)
        return current.forward, _numbered(layer, invocation, current.invocations), current.pending

    def _new(self, ends: bool) -> _Pass:
        return _Pass(Forward(next(self._numbers), torch.is_grad_enabled(), ends=ends))

    def _direct(self, outermost: observer.Invocation) -> _Pass:
        """The forward of a part of the model that was called by itself."""
        if outermost.forward is None:
            outermost.forward = self._new(ends=False)
        current: _Pass = outermost.forward
        return current

    def _loose(self, layer: str) -> _Pass:
        """The forward of a graph that no module is seen to run: a layer that comes again begins the next one."""
        current = self._thread.loose
        if current is None or layer in current.invocations:
            current = self._thread.loose = self._new(ends=False)
        return current


def _numbered(layer: str, invocation: observer.Invocation, seen: dict[str, int]) -> int:
    """The number of an invocation of the layer. seen: how many each layer has had in this forward."""
    if layer not in invocation.numbers:
        invocation.numbers[layer] = seen.get(layer, 0)
        seen[layer] = invocation.numbers[layer] + 1
    return invocation.numbers[layer]


_roots: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Forwards]] = weakref.WeakKeyDictionary()


def install(root: nn.Module, forwards: Forwards) -> list[Patch]:
    """Tell `forwards` of each call of `root`, also where torch.compile wraps it, until `uninstall`.

    The patches have to be released then. Neither the model nor `forwards` is kept alive.
    """
    _roots[root] = weakref.ref(forwards)
    places = {type(root), *dynamo.wrapper_classes()}
    return [
        patch
        for cls in places
        for patch in Patch.everywhere(cls, "__call__", functools.partial(_interceptor, cls), ())
    ]


def uninstall(root: nn.Module) -> None:
    """Undo `install`, but for its patches."""
    _roots.pop(root, None)


def _interceptor(cls: type, original: Callable[..., Any]) -> Callable[..., Any]:
    inherited = "__call__" not in vars(cls)

    @functools.wraps(original)
    def __call__(self: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(original, self)
        if inherited:  # looked up now: others, such as torch.fx, replace nn.Module.__call__ for a while
            call = super(cls, self).__call__  # type: ignore[arg-type]  # mypy takes no variable there
        if torch.compiler.is_compiling() or not (observer.active or observer.keeping):
            return call(*args, **kwargs)
        known = _roots.get(dynamo.unwrapped(self))
        forwards = None if known is None else known()
        if forwards is None:
            return call(*args, **kwargs)
        with shared(), forwards.running():
            return call(*args, **kwargs)

    return __call__
