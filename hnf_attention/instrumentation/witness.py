"""What modules around attention were called with when they were first measured: for a trial of their copies.

Kept are shapes and types, and tensors that hold no activations by their size: rotary tables and small masks.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import compat
from . import observer

#: A larger tensor is remembered by its shape and type alone.
MOST_ELEMENTS = 2**20
_LONGEST, _DEEPEST = 64, 4  # of the lists, tuples and dicts that are looked into
_ACTIVATIONS = "hidden_states"  # how classes of transformers call the first argument
_NEAREST = 2  # of the running modules: the one that calls attention, and the one around it


@dataclass(frozen=True)
class Spec:
    """A tensor by its shape and type."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Given:
    """The arguments of a call, with a `Spec` in place of each large tensor."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


_calls: weakref.WeakKeyDictionary[nn.Module, Given] = weakref.WeakKeyDictionary()
#: Copies of tensors that are kept, by the identity and version of these, and the tensors.
_copies: weakref.WeakValueDictionary[tuple[int, int], Tensor] = weakref.WeakValueDictionary()
_sources: dict[tuple[int, int], weakref.ref[Tensor]] = {}


def record() -> None:
    """Remember the arguments of the innermost modules that run now, once each."""
    for number, (module, args, kwargs) in enumerate(observer.running_calls()):
        if number == _NEAREST:
            return
        if module not in _calls:
            first = [_spec(x) if isinstance(x, Tensor) else x for x in args[:1]]
            named = {
                name: _spec(x) for name, x in kwargs.items() if name == _ACTIVATIONS and isinstance(x, Tensor)
            }
            _calls[module] = Given(_light((*first, *args[1:])), _light({**kwargs, **named}))


def of(module: nn.Module) -> Given | None:
    """What a module was called with, None if that is not known."""
    return _calls.get(module)


def _copy(x: Tensor) -> Tensor:
    """A copy of a tensor; modules that are given the same one share it."""
    place = id(x), compat.version(x)
    source, copied = _sources.get(place), _copies.get(place)
    if copied is None or source is None or source() is not x:
        _sources[place] = weakref.ref(x)
        copied = _copies[place] = x.detach().clone()
    return copied


def _spec(x: Tensor) -> Spec:
    return Spec(tuple(x.shape), x.dtype)


def _light(value: Any, depth: int = 0) -> Any:
    """The value without large tensors, and without whatever else a call may hold alive."""
    if isinstance(value, Tensor):
        small = value.numel() <= MOST_ELEMENTS and not value.requires_grad and value.grad_fn is None
        return _copy(value) if small else _spec(value)
    if isinstance(value, (dict, list, tuple)):
        if len(value) > _LONGEST or depth >= _DEEPEST:
            return None
        if isinstance(value, dict):
            return {key: _light(one, depth + 1) for key, one in value.items()}
        return tuple(_light(one, depth + 1) for one in value)
    return value if isinstance(value, (str, int, float, bool, type(None), torch.dtype, Spec)) else None
