"""Which errors are whose: those that a user can put right, those of a signal, and faults of our own."""

from __future__ import annotations

import functools
import logging
import signal
import sys
from collections.abc import Iterator
from types import CodeType, FrameType, TracebackType
from typing import Any

_log = logging.getLogger("hnf_attention")
_reported: set[tuple[str, str]] = set()


class InputError(ValueError):
    """The user's input is not usable. The message is one line that says why."""


def let_out(error: BaseException) -> None:
    """Raise the error of the user's signal handler, if this is one or hides one. Call it where the error is caught.

    A handler runs between any two instructions of the main thread, so also within code that may not end the run. Its
    error, such as that of a time limit, is meant for the run all the same. A library that it interrupts may raise an
    error of its own in its place, also `from None`. An interrupt by Ctrl-C may be hidden in the same way.
    """
    handlers = _handlers()
    for each in _hidden_in(error):
        if isinstance(each, KeyboardInterrupt) or not handlers.isdisjoint(_codes(each.__traceback__)):
            raise each


def report(what: str, error: Exception) -> None:
    """Log a fault of our own that ends nothing: a failing part of every step says so once, not at every step.

    what: what could not be done.
    """
    let_out(error)
    key = what, type(error).__name__
    if key not in _reported:
        _reported.add(key)
        _log.warning("hnf-attention: %s; training goes on, and this is not said again", what, exc_info=error)


def _hidden_in(error: BaseException) -> Iterator[BaseException]:
    """The error, and those in whose place it was raised.

    Left out are those that somebody handles who called this code: they were there before.
    """
    waiting, seen, running = [error], {id(error)}, set[FrameType]()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        running.add(frame)
        frame = frame.f_back
    while waiting:
        each = waiting.pop()
        caught = each.__traceback__
        if each is not error and (caught is None or caught.tb_frame in running):
            continue
        yield each
        for other in (each.__cause__, each.__context__):
            if other is not None and id(other) not in seen:
                seen.add(id(other))
                waiting.append(other)


def _handlers() -> set[CodeType]:
    """The code of the functions that the user gave as signal handlers."""
    handlers = (signal.getsignal(number) for number in signal.valid_signals())
    return {code for handler in handlers if (code := _code(handler)) is not None}


def _code(function: Any) -> CodeType | None:
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    # An object that can be called. `SIG_DFL` is none, but its metaclass is.
    if not hasattr(function, "__code__"):
        calls = (vars(kind).get("__call__") for kind in type(function).__mro__)
        function = next((call for call in calls if call is not None), None)
    return getattr(function, "__code__", None)


def _codes(traceback: TracebackType | None) -> Iterator[CodeType]:
    while traceback is not None:
        yield traceback.tb_frame.f_code
        traceback = traceback.tb_next
