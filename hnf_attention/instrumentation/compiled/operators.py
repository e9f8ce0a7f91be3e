"""What interceptors do while Dynamo traces: they leave an operator beside the attention, which measures at run time.

Whether anything is measured, and by whom, is decided at run time inside the operator, so that no recording and no
skipping recompiles anything. The layer comes to it as a tensor that the module keeps as an attribute, an input of
the graph like its weights: blocks that share one compiled graph stay apart. The operator says that it mutates that
tensor, which keeps it in the graph; it has no gradient, and in a backward, where a checkpoint may bring it again,
it does nothing.

Which module calls is asked of the tracer's own stack, through Dynamo's `comptime`, its interceptor for such questions.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from ...engine.call import autocast
from .. import observer
from ..call import COMPILED, AttentionCall
from ..coverage import is_attention

ATTRIBUTE = "_hnf_attention_layer"

_log = logging.getLogger("hnf_attention")

_numbers = itertools.count(1)
_modules: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
#: Modules of models that a graph was compiled of while an interceptor was in place.
_traced: weakref.WeakSet[nn.Module] = weakref.WeakSet()
#: Of these, the ones that gave up their inference fast path.
slowed: weakref.WeakSet[nn.Module] = weakref.WeakSet()
#: And the ones whose attention no operator can be beside, with the reason.
unreached: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
#: Of a module that no graph was seen to run; untrue of one that is measured.
SHARED = "a compiled graph may run it as a region that was traced of another module of its class"


class Layer:
    """A module's number, where a compiled graph finds it. Copies and pickles of a module get None instead."""

    def __init__(self, number: int):
        self.tensor = torch.tensor(number, dtype=torch.int64, device="cpu")

    def __reduce__(self):
        return type(None), ()


#: Of a graph in whose traced part no module is called, as behind a graph break: the one that calls the graph is
#: found when it runs.
_caller = Layer(0)


def mark(modules: Collection[nn.Module]) -> None:
    """Make an instrumented model's modules known to the graphs that are compiled of it.

    Not before the first of them is traced: a model that is never compiled stays as it was, and so do its pickles.
    """
    _traced.update(modules)
    for module in modules:
        if module.__dict__.get(ATTRIBUTE) is None:
            number = next(_numbers)
            _modules[number] = module
            with torch.inference_mode(False):
                module.__dict__[ATTRIBUTE] = Layer(number)


def mark_compiled(modules: Collection[nn.Module]) -> None:
    """`mark`, where there are graphs from before: one with an operator comes into use again, one without goes out."""
    if any(module in _traced for module in modules):
        mark(modules)


def unmark(module: nn.Module) -> None:
    """Undo `mark`. Graphs that hold the operator are guarded by the attribute, and go out of use."""
    module.__dict__.pop(ATTRIBUTE, None)


def owner_of(layer: Tensor) -> observer.Owner | None:
    """Who measures this run of an operator; None where nobody does."""
    if not observer.measuring:  # what a step that is not measured pays
        return None
    number = layer.item()
    module = _modules.get(number)
    owner = observer.running_owner() if number == 0 else None if module is None else observer.owner(module)
    if owner is None or not owner.instrumentation.measuring or observer.thread.suspended:
        return None
    # In a backward it is the second forward of a checkpoint.
    return None if torch._C._current_graph_task_id() != -1 else owner


def measure(owner: observer.Owner, build: Callable[[], AttentionCall]) -> None:
    """Measure the call that `build` describes, whose output the compiled graph computes by itself."""

    def described() -> AttentionCall:
        call = build()
        call.not_fused = call.place = COMPILED
        return call

    owner.instrumentation.attend(owner.layer, described, lambda: None)


def operator(name: str, schema: str, measure: Callable[..., None]) -> Callable[..., None]:
    """Define an operator `(Tensor(a!) layer, <schema>) -> ()` that runs `measure` when its graph runs.

    By the plain functions of torch.library: `custom_op` would cost each run that measures nothing several times more.
    """
    unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)  # it runs Python: a CUDA graph is cut around it
    tags = [torch.Tag.flexible_layout] + [unsafe] * (unsafe is not None)
    name = f"hnf_attention::{name}"
    torch.library.define(name, f"(Tensor(a!) layer, {schema}) -> ()", tags=tags)
    torch.library.impl(name, "CompositeExplicitAutograd", measure)
    torch.library.register_fake(name, lambda *_, **__: None)
    return getattr(torch.ops.hnf_attention, name.rpartition(":")[2]).default


def _unmeasured(layer: Tensor, reason: str) -> None:
    owner = owner_of(layer)
    if owner is not None:
        owner.instrumentation.note(owner.layer, f"a compiled graph calls it with {reason}")


#: Lists the layer, with the reason, whenever the graph runs.
unmeasured = operator("list_unmeasured", "str reason", _unmeasured)


def inputs(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """As the attention beside the operator takes them: autocast does not reach into a compiled graph."""
    return autocast(query.detach(), key.detach(), value.detach())


def detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def announced(heads: tuple[int, int] | None, original: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    """Call `original`. On the tracer's stack this frame says how many heads queries and keys have inside it.

    heads: None where all attention inside is part of a call that is measured already.
    """
    return original(*args, **kwargs)


def running(
    *tensors: Tensor | None, numbers: tuple[Any, ...] = (), attention_only: bool = False, slowed: bool = False
) -> tuple[Tensor | None, Any]:
    """The layer's tensor for an operator, None where no operator is wanted, and the heads that were announced.

    tensors, numbers: what the operator would be given; numpy's numbers are tensors here. attention_only: only in
    modules that are named like attention. slowed: the module gives up its inference fast path for it. To be traced,
    never to be run.
    """
    from torch._dynamo.comptime import comptime

    _elsewhere, layer, module, heads, strange = _caller, None, None, None, None
    comptime(_find)
    if module is not None:
        # Also read where it is missing: the graph goes out of use when the module comes to be instrumented.
        layer = getattr(module, ATTRIBUTE, None)
    if layer is not None and strange is not None:
        unmeasured(layer.tensor, strange)
        layer = None
    return (None if layer is None else layer.tensor), heads


def _find(context: Any) -> None:
    """Ask the tracer's stack, and set the locals of `running`, which it is in. No error may come out."""
    try:
        tracer = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
        exported = tracer.output.export or torch.compiler.is_exporting()
        if not exported:
            tracer.symbolic_locals.update(_found(tracer))
    except Exception as error:  # another version of Dynamo; the model compiles as it is
        _log.warning("hnf-attention does not reach attention in this compiled graph", exc_info=error)


def _found(tracer: Any) -> dict[str, Any]:
    from torch._dynamo.variables import ConstantVariable

    asked = tracer.symbolic_locals
    attention_only = asked["attention_only"].as_python_constant()
    frame, nearest, found, heads = tracer.parent, None, None, {}
    while frame is not None:
        if frame.f_code is announced.__code__:
            heads = {"heads": frame.symbolic_locals["heads"]}
            if heads["heads"].is_python_constant() and heads["heads"].as_python_constant() is None:
                return {}
        variable = _module(frame)
        if variable is not None and not (attention_only and isinstance(variable.value, nn.Softmax)):
            nearest = nearest or variable
            if found is not None and found.value is not variable.value:
                break  # what is announced further out is not of this module
            if observer.owner(variable.value) is not None:
                found = variable
        frame = frame.parent
    if found is None and nearest is not None:
        _traced.add(nearest.value)
        return {"module": nearest}
    owner = observer.running_owner() if found is None else observer.owner(found.value)
    if owner is None or (attention_only and not is_attention(owner.module)):
        return {}
    why = _why_unreached(tracer)
    if why is not None:
        _list_unreached(owner, why)
        return {}
    where = {"layer": asked["_elsewhere"]} if found is None else {"module": found}
    if found is not None:
        mark(observer.owned(owner.instrumentation))
    strange = _strange(asked)
    if strange is None and asked["slowed"].as_python_constant():
        owner.instrumentation.slowed.add(owner.layer)
        slowed.add(owner.module)
    return heads | where | {"strange": ConstantVariable.create(strange)}


def _why_unreached(tracer: Any) -> str | None:
    """What an operator could not pass through: a transform, or the body of a higher-order operator.

    Checkpoints are one, and their bodies, like those of autograd's functions, end as part of the graph around them.
    """
    if torch._C._are_functorch_transforms_active():
        return observer.TRANSFORMED
    inlined = (torch.ops.higher_order.tag_activation_checkpoint, "autograd.Function")
    part = tracer.output.current_tracer
    while part.parent is not None:
        if part.source_target not in inlined:
            return f"a compiled graph runs it inside {part.source_target}"
        part = part.parent
    return None


def _list_unreached(owner: observer.Owner, why: str) -> None:
    """List the layer now, and in later instrumentations, to which its graph says nothing again."""
    owner.instrumentation.note(owner.layer, why)
    unreached[owner.module] = why
    if why.endswith("invoke_subgraph"):  # of layers that are equal, Dynamo traces the first one only
        for module in observer.owned(owner.instrumentation):
            other = observer.owner(module)
            if other is not None and type(module) is type(owner.module):
                other.instrumentation.note(other.layer, unreached.setdefault(module, SHARED))


def _is_untouched(variable: Any) -> bool:
    """Whether it is something other than a module that the graph did not look at yet, which would guard it."""
    from torch._dynamo.variables.lazy import LazyVariableTracker

    lazy = isinstance(variable, LazyVariableTracker) and not variable.is_realized()
    return lazy and not isinstance(variable.peek_value(), nn.Module)


def _module(frame: Any) -> Any:
    """The variable of the module whose method this frame is, or that is the first argument of a function."""
    from torch._dynamo.variables.misc import CellVariable

    names = frame.f_code.co_varnames[: frame.f_code.co_argcount][:1]
    variable = frame.symbolic_locals.get(names[0]) if names else None
    if _is_untouched(variable):
        return None
    if isinstance(variable, CellVariable):  # a function or a generator inside the method uses it too
        variable = frame.output.side_effects.load_cell(variable)
        if _is_untouched(variable):
            return None
    variable = None if variable is None else variable.realize()
    return variable if isinstance(getattr(variable, "value", None), nn.Module) else None


def _strange(asked: dict[str, Any]) -> str | None:
    """What no operator can be given."""
    types = {variable.python_type() for variable in asked["tensors"].items}
    strange = [f"a {kind.__name__}" for kind in types - {Tensor, nn.Parameter, type(None)}]
    kinds = {variable.python_type() for variable in asked["numbers"].items}
    strange += [f"a scale that is a {kind.__name__}" for kind in kinds - {int, float, type(None)}]
    return strange[0] if strange else None
