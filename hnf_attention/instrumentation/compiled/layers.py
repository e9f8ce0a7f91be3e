"""How an operator in a compiled graph knows its layer: by tensors that the module keeps in an attribute.

They are inputs of the graph, as weights are, so blocks that share one compiled graph stay apart. Who measures the layer
is asked when the graph runs, or by the graph itself, so recording a step or leaving it out recompiles nothing.
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
from ..graph_reader import GraphKind
from . import slots

ATTRIBUTE = "_hnf_attention_layer"

_numbers = itertools.count(1)
_modules: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
#: Modules of which a graph was compiled while an interceptor was in place.
_traced: weakref.WeakSet[nn.Module] = weakref.WeakSet()
#: Classes of the modules among them that nobody measured.
_unmeasured: weakref.WeakSet[type[nn.Module]] = weakref.WeakSet()
#: The kinds of slots that graphs of a module ask for.
_kinds: weakref.WeakKeyDictionary[nn.Module, dict[str, GraphKind]] = weakref.WeakKeyDictionary()
#: Modules with a call that graphs do not measure by themselves, with the reason, which a graph gives only once.
_ungraphed: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


class Layer:
    """What a compiled graph finds at a module. Copies and pickles of a module get None instead.

    tensor: the module's number. graphed: whether its calls are folded by the graph itself, into slots, which are
    attributes of their own.
    """

    def __init__(self, number: int, graphed: bool = False):
        self.tensor = torch.tensor(number, dtype=torch.int64, device="cpu")
        self.graphed = graphed

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
            _mark(module)


def _mark(module: nn.Module) -> None:
    number, owner = next(_numbers), observer.owner(module)
    reader = None if owner is None else owner.observer.graph_reader
    _modules[number] = module
    with torch.inference_mode(False):
        module.__dict__[ATTRIBUTE] = Layer(number, graphed=reader is not None)
    if owner is None or reader is None:
        return
    for kind in _kinds.get(module, {}).values():
        slot(module, kind._replace(layer=owner.layer))
    if module in _ungraphed:
        owner.observer.note_ungraphed(owner.layer, _ungraphed[module])


def mark_compiled(modules: Collection[nn.Module]) -> None:
    """`mark` anew, if graphs of these modules exist: those that hold our operators run again, the others no longer.

    Also where other handles measure them from now on.
    """
    if any(module in _traced or type(module) in _unmeasured for module in modules):
        for module in modules:
            unmark(module)
        mark(modules)


def mark_later(module: nn.Module) -> None:
    """Note that a graph without an operator was compiled of a module that nobody measures.

    Modules of its class would run that graph, too: those that are measured are marked, now or when they come.
    """
    _traced.add(module)
    _unmeasured.add(type(module))
    for other in observer.modules():
        if type(other) is type(module) and other.__dict__.get(ATTRIBUTE) is None:
            _mark(other)


def unmark(module: nn.Module) -> None:
    """Undo `mark`. Graphs that hold the operator are guarded by the attribute, and go out of use."""
    module.__dict__.pop(ATTRIBUTE, None)


def slot(module: nn.Module, kind: GraphKind) -> str | None:
    """The name of a marked module's slot of this kind, which is made if need be; None if nobody would read it."""
    owner, layer = observer.owner(module), module.__dict__[ATTRIBUTE]
    reader = None if owner is None else owner.observer.graph_reader
    if reader is None or not layer.graphed:
        return None
    name = slots.name_of(kind)
    _kinds.setdefault(module, {})[name] = kind
    if name not in vars(layer):
        with torch.inference_mode(False), torch.no_grad():
            setattr(layer, name, slots.Slot(kind, reader.state(kind), reader, module))
    return name


def leave_ungraphed(owner: observer.Owner, reason: str) -> None:
    """Note that a graph does not measure a call of this layer by itself, but by Python when it runs."""
    _ungraphed[owner.module] = reason
    owner.observer.note_ungraphed(owner.layer, reason)


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
