"""Which module makes a call that Dynamo traces: asked of Dynamo's own stack, while it traces.

Interceptors call `find_layer` in traced code, and leave an operator with its answer in the graph.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ... import compat
from ...compat import dynamo
from ...errors import let_out
from .. import observer
from ..coverage import is_attention
from . import graphed, layers, operators

#: The reason for a module that no graph was seen to run. It does not hold for one that is measured.
SHARED = "a compiled graph may run it as a region that was traced of another module of its class"

_log = logging.getLogger("hnf_attention")
#: Modules that gave up their inference fast path in a graph.
_slowed: weakref.WeakSet[nn.Module] = weakref.WeakSet()
#: Modules whose attention no operator can stand beside, with the reason.
_unreached: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def slowed_before(modules: Mapping[str, nn.Module]) -> set[str]:
    """Names of the modules that gave up their inference fast path in a graph of before, which says so only once."""
    return {name for name, module in modules.items() if module in _slowed}


def unreached_before(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Names of the modules that a graph of before hides, with the reason, which the graph gives only once."""
    return {name: _unreached[module] for name, module in modules.items() if module in _unreached}


def announced(
    heads: tuple[int, int] | None,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call `original`. `find_layer` sees this frame, and learns how many heads queries and keys of the call have.

    heads: None if an operator measures the call already. Attention inside of it then leaves no operator.
    """
    return original(*args, **kwargs)


def find_layer(
    *tensors: Tensor | None,
    numbers: tuple[Any, ...] = (),
    attention_only: bool = False,
    slowed: bool = False,
    into_slot: bool = False,
) -> tuple[Any, Any]:
    """(the layer's tensor for an operator, None if no operator is wanted; the heads that were announced).

    For code that Dynamo traces. While Dynamo traces this function, `_find` sets its local variables.

    tensors, numbers: what the operator would be given. A number of numpy is a tensor here.
    attention_only: take only modules whose class is named like attention, or named by the user.
    slowed: the module gives up its inference fast path to be measured.
    into_slot: give the layer's `Slot` in place of its tensor, where the graph can measure the call by itself. The
        tensors are query, key, value and mask of a scaled_dot_product_attention.
    """
    _elsewhere = layers.CALLER
    slot: str | None = None
    layer: Any = None
    module: Any = None
    heads: Any = None
    strange: str | None = None
    dynamo.comptime()(_find)
    if module is not None:
        # Also read where it is missing: the graph goes out of use when the module comes to be instrumented.
        layer = getattr(module, layers.ATTRIBUTE, None)
    if layer is not None and strange is not None:
        operators.unmeasured(layer.tensor, strange)
        layer = None
    if layer is None:
        return None, heads
    # Also read where there is no slot: the graph goes out of use when somebody comes who reads slots, or leaves.
    if layer.graphed and slot is not None:
        return getattr(layer, slot), heads
    return layer.tensor, heads


def _find(context: Any) -> None:
    """Set the local variables of `find_layer`. No error may come out."""
    try:
        asked = dynamo.Frame(context)
        if not asked.is_exported():
            asked.assign(_found(asked))
    except Exception as error:  # another version of Dynamo; the model compiles as it is
        let_out(error)
        _log.warning("hnf-attention does not reach attention in this compiled graph", exc_info=error)


def _found(asked: dynamo.Frame) -> dict[str, Any]:
    """The local variables of `find_layer`, by name, as Dynamo's variables."""
    attention_only = dynamo.constant_of(asked.local("attention_only"))
    nearest = found = None  # variables of modules: the innermost, and the innermost instrumented one
    heads: dict[str, Any] = {}
    for frame in asked.callers():
        if frame.code is announced.__code__:
            heads = {"heads": frame.local("heads")}
            if dynamo.is_none(heads["heads"]):
                return {}
        variable = frame.first_argument()
        if variable is None:
            continue
        module = dynamo.module_of(variable)
        if attention_only and isinstance(module, nn.Softmax):
            continue
        nearest = nearest or variable
        if found is not None and dynamo.module_of(found) is not module:
            break  # what is announced further out is not of this module
        if observer.owner(module) is not None:
            found = variable
    if found is None and nearest is not None:
        layers.mark_later(dynamo.module_of(nearest))
        return {"module": nearest}
    owner = observer.running_owner() if found is None else observer.owner(dynamo.module_of(found))
    if owner is None or (
        attention_only and not (is_attention(owner.module) or owner.observer.is_named(owner.module))
    ):
        return {}
    why = _why_unreached(asked)
    if why is not None:
        _list_unreached(owner, why)
        return {}
    where = {"layer": asked.local("_elsewhere")} if found is None else {"module": found}
    if found is not None:
        layers.mark(observer.modules_of(owner.observer))
    strange = _strange(asked)
    if strange is None and dynamo.constant_of(asked.local("slowed")):
        owner.observer.note_slowed(owner.layer)
        _slowed.add(owner.module)
    slot = None
    if strange is None and owner.observer.graph_reader is not None:
        slot, reason = graphed.slot(asked, owner, heads.get("heads"), bool(found))
        if reason is not None:
            layers.leave_ungraphed(owner, reason)
    return heads | where | {"strange": dynamo.constant(strange), "slot": dynamo.constant(slot)}


def _why_unreached(asked: dynamo.Frame) -> str | None:
    """The transform or higher-order operator around the call that no operator of ours can leave; None for none.

    The bodies of checkpoints and of autograd's functions become part of the graph around them.
    """
    if compat.functorch_transform():
        return observer.TRANSFORMED
    inlined = (torch.ops.higher_order.tag_activation_checkpoint, "autograd.Function")
    around = next((body for body in asked.bodies() if body not in inlined), None)
    return None if around is None else f"a compiled graph runs it inside {around}"


def _list_unreached(owner: observer.Owner, why: str) -> None:
    """List the layer now, and keep the reason for later instrumentations, to which the graph does not say it again."""
    owner.observer.note(owner.layer, why)
    _unreached[owner.module] = why
    if why.endswith("invoke_subgraph"):  # of layers that are equal, Dynamo traces the first one only
        for module in observer.modules_of(owner.observer):
            other = observer.owner(module)
            if other is not None and type(module) is type(owner.module):
                other.observer.note(other.layer, _unreached.setdefault(module, SHARED))


def _strange(asked: dynamo.Frame) -> str | None:
    """What an operator cannot be given, in words; None if it can be given everything."""
    tensors = dynamo.types_in(asked.local("tensors")) - {Tensor, nn.Parameter, type(None)}
    numbers = dynamo.types_in(asked.local("numbers")) - {int, float, type(None)}
    strange = [f"a {kind.__name__}" for kind in tensors]
    strange += [f"a scale that is a {kind.__name__}" for kind in numbers]
    return strange[0] if strange else None
