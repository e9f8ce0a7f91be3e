"""Catches the calls of attention functions that are described by their arguments alone.

Each interceptor of such a library names its functions, and says how one of their calls is described. In a compiled
graph an operator beside the call gets its tensors, its whole numbers, and all other arguments as text. It describes the
call when the graph runs.
"""

from __future__ import annotations

import ast
import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ...compat import dynamo
from ...errors import let_out
from ...tracing import traced, transformed
from .. import observer
from ..call import AttentionCall
from ..compiled import layers, operators, tracer

_MODULE = "self"  # the parameter of a method that is the layer itself
_KINDS = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL  # which text cannot name

_log = logging.getLogger("hnf_attention")
#: What describes the calls of each function, by the names that compiled graphs know them by.
_describers: dict[str, Callable[..., AttentionCall]] = {}


def interceptor(
    library: str, describe: Callable[..., AttentionCall], original: Callable[..., Any]
) -> Callable[..., Any]:
    """The replacement of `original`.

    library: its name for the coverage, and in compiled graphs. describe: makes a call's description, from the
        arguments.
    """
    names = _names(original)
    _describers[library] = describe

    @functools.wraps(original)
    def attend(*args: Any, **kwargs: Any) -> Any:
        if transformed():
            if traced():
                _beside(library, None if names is None else dict(zip(names, args)) | kwargs)
                return tracer.announced(None, original, args, kwargs)
            observer.list_transformed()
            return original(*args, **kwargs)
        return observer.run(original, args, kwargs, describe)

    # functools.wraps copied the attributes of a compiled original, which Dynamo would trace in place of this function.
    dynamo.let_trace(attend)
    return attend


def _names(original: Callable[..., Any]) -> list[str] | None:
    """The parameters of a function, None where some have no name."""
    try:
        parameters = inspect.signature(original).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind in _KINDS for parameter in parameters):
        return None
    return [x.name for x in parameters if x.kind is not x.VAR_KEYWORD]


def _beside(library: str, given: dict[str, Any] | None) -> None:
    """Leave the operator in the graph. To be traced; `_write` sets `text`.

    given: the arguments by name, None where they have no names.
    """
    named = {} if given is None else given
    tensors = [x for x in named.values() if isinstance(x, Tensor)]
    layer, _ = tracer.find_layer(*tensors)
    if layer is None:
        return
    text: str | None = None
    numbers = [x for x in named.values() if type(x) is int]
    if given is not None:
        _names_of = [name for name, x in named.items() if isinstance(x, Tensor)]
        _counted = [name for name, x in named.items() if type(x) is int]
        _others = [
            (name, x)
            for name, x in named.items()
            if not isinstance(x, Tensor) and type(x) is not int and name != _MODULE
        ]
        _module = [name for name in named if name == _MODULE]
        dynamo.comptime()(_write)
    if text is None:
        operators.unmeasured(layer, f"{library} and arguments that cannot be read there")
    else:
        _operator(layer, [x.detach() for x in tensors], numbers, library, text)


def _write(context: Any) -> None:
    """Set `text` of `_beside`, unless an argument is no number, text, or tuple of them. No error may come out."""
    try:
        frame = dynamo.Frame(context)
        names, counted, others, module = (
            dynamo.constant_of(frame.local(name)) for name in ("_names_of", "_counted", "_others", "_module")
        )
        plain = [(name, _plain(value)) for name, value in others]
        text = repr((list(names), list(counted), plain, bool(module)))
        ast.literal_eval(text)
        frame.assign({"text": dynamo.constant(text)})
    except Exception as error:
        let_out(error)
        _log.debug("hnf-attention does not describe this call in its compiled graph", exc_info=error)


def _plain(value: Any) -> Any:
    return tuple(map(_plain, value)) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _measure(layer: Tensor, tensors: list[Tensor], numbers: list[int], library: str, text: str) -> None:
    """What the operator does when its graph runs."""
    owner = layers.owner_of(layer)
    if owner is None:
        return
    if library not in _describers:  # a graph of another process, before the library was seen here
        owner.observer.note(
            owner.layer, f"a compiled graph calls it with {library}, which is not imported yet"
        )
        return
    names, counted, others, module = ast.literal_eval(text)
    given = dict(zip(names, tensors)) | dict(zip(counted, numbers)) | dict(others)
    if module:
        given[_MODULE] = owner.module
    operators.measure(owner, functools.partial(_describers[library], **given))


_operator = operators.operator(
    "observe_described", "Tensor[] tensors, SymInt[] numbers, str library, str text", _measure
)
