"""What is made of a user mask, once for all calls of a forward: a model gives one mask to all its layers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor

from .. import compat

_Made = TypeVar("_Made")
#: Results that are kept: a copy and the hidden keys of two masks, as of self- and cross-attention.
MOST_MADE = 4


class _Thread(threading.local):
    """made: what was made in the forward that runs, each with its mask, which keeps its memory until then."""

    made: dict[Hashable, tuple[Tensor, Any]] | None = None


_thread = _Thread()


@contextmanager
def shared() -> Iterator[None]:
    """Inside, `once` makes nothing twice. Nothing is kept after it."""
    outer = _thread.made
    _thread.made = {} if outer is None else outer
    try:
        yield
    finally:
        _thread.made = outer


@contextmanager
def apart() -> Iterator[None]:
    """Inside, `once` keeps nothing: the memory of a CUDA graph may hold no tensors but the graph's own."""
    outer, _thread.made = _thread.made, None
    try:
        yield
    finally:
        _thread.made = outer


def once(what: Hashable, mask: Tensor, make: Callable[[], _Made]) -> _Made:
    """`make()`, or what it gave before in this forward for a mask with the same memory, layout and version.

    what: names the thing that is made of the mask alone.
    """
    made = _thread.made
    if made is None or mask.is_inference():  # such a mask has no version
        return make()
    place = what, mask.data_ptr(), compat.version(mask), mask.shape, mask.stride(), mask.dtype, mask.device
    found = made.get(place)
    if found is None:
        while len(made) >= MOST_MADE:  # a model with a mask for each layer would fill the memory
            made.pop(next(iter(made)))
        found = made[place] = mask, make()
    result: _Made = found[1]
    return result
