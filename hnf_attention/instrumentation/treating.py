"""What an interceptor asks before anything else: whether somebody changes the call that is made here.

A change comes first, so whoever measures the layer sees the changed call. See `treated` for who changes calls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from ..tracing import running_modules, transformed


class Running(Protocol):
    """One call of a module whose attention is changed, while it runs."""

    @property
    def module(self) -> nn.Module:
        """The module."""

    def run(self, original: Callable[..., Any], sdpa: bool, *args: Any, **named: Any) -> Any:
        """Compute the changed call of `original`, which takes query, key and value first, by place or by name.

        sdpa: it is scaled_dot_product_attention, or what takes its place.
        """


class Finder(Protocol):
    """Looks for the modules of one model that call attention."""

    def found(self, module: nn.Module, query: Tensor, key: Tensor) -> Running | None:
        """Take in a call that `module` makes, as the innermost one that runs. Returns what changes this very call."""


class _Thread(threading.local):
    """The calls that run on this thread, the innermost last."""

    def __init__(self) -> None:
        self.running: list[Running] = []


thread = _Thread()
#: Those who look for attention now; empty nearly always.
finders: list[Finder] = []


def current(query: Tensor | None = None, key: Tensor | None = None, *_: Any, **__: Any) -> Running | None:
    """Who changes the attention call made here, with these queries and keys; None for nobody."""
    if finders and query is not None and key is not None:
        found = _discover(query, key)
        if found is not None:
            return found
    if thread.running and not transformed():
        # An interrupt such as Ctrl-C passes the hooks by: calls that it ended are dropped.
        running = list(running_modules())
        while thread.running and not any(thread.running[-1].module is module for module in running):
            thread.running.pop()
    return thread.running[-1] if thread.running else None


def _discover(query: Tensor, key: Tensor) -> Running | None:
    """Tell the finders of a call. In a graph that is traced there is no stack to look at."""
    module = next(running_modules(), None)
    if module is None:
        return None
    answers = [finder.found(module, query, key) for finder in list(finders)]
    return next((answer for answer in answers if answer is not None), None)
