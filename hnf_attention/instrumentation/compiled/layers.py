"""How an operator in a compiled graph knows its layer: by a tensor that the module keeps as an attribute.

The tensor is an input of the graph, as a weight is, so blocks that share one compiled graph stay apart. Who measures
the layer is asked when the graph runs, so recording a step or leaving it out recompiles nothing.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from ... import compat
from .. import observer

ATTRIBUTE = "_hnf_attention_layer"

_numbers = itertools.count(1)
_modules: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
#: Modules of which a graph was compiled while an interceptor was in place.
_traced: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class Layer:
    """A module's number, where a compiled graph finds it. Copies and pickles of a module get None instead."""

    def __init__(self, number: int):
        self.tensor = torch.tensor(number, dtype=torch.int64, device="cpu")

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()


#: The layer of a graph whose traced part calls no module, as behind a graph break. The module that calls such a graph
#: is found when the graph runs.
CALLER = Layer(0)


def mark(modules: Collection[nn.Module]) -> None:
    """Make an instrumented model's modules known to the graphs that are compiled of it.

    Called when the first of them is traced. A model that is never compiled stays as it was, and so do its pickles.
    """
    _traced.update(modules)
    for module in modules:
        if module.__dict__.get(ATTRIBUTE) is None:
            number = next(_numbers)
            _modules[number] = module
            with torch.inference_mode(False):
                module.__dict__[ATTRIBUTE] = Layer(number)


def mark_compiled(modules: Collection[nn.Module]) -> None:
    """`mark`, if graphs of these modules exist: those with our operator run again, those without it no longer."""
    if any(module in _traced for module in modules):
        mark(modules)


def mark_later(module: nn.Module) -> None:
    """Note that a graph without an operator was compiled of a module that nobody measures."""
    _traced.add(module)


def unmark(module: nn.Module) -> None:
    """Undo `mark`. Graphs that hold the operator are guarded by the attribute, and go out of use."""
    module.__dict__.pop(ATTRIBUTE, None)


def owner_of(layer: Tensor) -> observer.Owner | None:
    """The owner that measures this run of an operator; None where nobody does."""
    if not observer.active:  # a step that is not measured pays for this branch alone
        return None
    number = int(layer.item())
    module = _modules.get(number)
    owner: Any = None
    if number == 0:
        owner = observer.running_owner()
    elif module is not None:
        owner = observer.owner(module)
    if owner is None or not owner.observer.measuring or observer.thread.suspended:
        return None
    # Inside a backward it is the second forward of a checkpoint.
    return owner if compat.running_backward() == -1 else None
