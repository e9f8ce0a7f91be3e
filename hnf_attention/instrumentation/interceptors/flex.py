"""Catches every call of `torch.nn.attention.flex_attention.flex_attention`.

Users mostly call the function that torch.compile made of it, before anything was instrumented. A compiled function
runs nothing of PyTorch's that could be replaced, so it is replaced itself: in the files and classes of the model's
modules, and in the attributes of these modules. In a compiled model, an operator beside the call measures it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex

from ...compat import dynamo
from ...tracing import traced, transformed
from .. import observer
from ..call import AttentionCall
from ..compiled import flex as flex_compiled
from ..flex_call import Mod, described
from ..patches import Patch, classes, hidden, namespaces, of_attribute, of_class, of_item

NAME = "flex_attention"


def install(modules: Collection[nn.Module]) -> list[Patch]:
    """Replace the function, also where files and classes of these modules hold it, until the patches are released."""
    patches = Patch.everywhere(flex, NAME, functools.partial(_interceptor, compiled=False), modules)
    for read, write in _held(modules):
        compiled = dynamo.is_compiled(read())
        patches.append(Patch.acquire(read, write, functools.partial(_interceptor, compiled=compiled)))
    return patches


def unreachable(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Why modules that hold a flex_attention out of reach are not measured, by their names."""
    return hidden(modules, [inspect.unwrap(flex.flex_attention)])


def _is_flex(value: Any) -> bool:
    """Whether it is flex_attention, our replacement, or what torch.compile made of one of them."""
    return isinstance(value, FunctionType) and inspect.unwrap(value) is inspect.unwrap(flex.flex_attention)


def _held(
    modules: Collection[nn.Module],
) -> Iterator[tuple[Callable[[], Any], Callable[[Any], None]]]:
    """How to read and write each place, without the globals that Patch.everywhere finds."""
    for space in namespaces(modules):
        for name, value in list(space.items()):
            if _is_flex(value) and dynamo.is_compiled(value):
                yield of_item(space, name)
    for cls in classes(modules):
        for name, value in list(vars(cls).items()):
            static = isinstance(value, staticmethod)
            if _is_flex(value.__func__ if static else value):
                yield of_class(cls, name, static)
    for module in modules:
        for name, value in list(vars(module).items()):
            if _is_flex(value):
                yield of_attribute(module, name)


def _interceptor(original: Callable[..., Any], *, compiled: bool) -> Callable[..., Any]:
    describe = functools.partial(_described, compiled)

    @functools.wraps(original)
    def flex_attention(*args: Any, **kwargs: Any) -> Any:
        if transformed():
            result = original(*args, **kwargs)
            if traced():
                _beside(*args, **kwargs)
            observer.list_transformed()
            return result
        return observer.run(original, args, kwargs, describe)

    # functools.wraps copied the attributes of a compiled original, which Dynamo would trace in place of this function.
    dynamo.let_trace(flex_attention)
    return flex_attention


def _described(
    compiled: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Mod | None = None,
    block_mask: flex.BlockMask | None = None,
    scale: float | None = None,
    *_: Any,
    **__: Any,
) -> AttentionCall:
    """The description of one call, from its arguments. Those after `scale` change no score."""
    return described(NAME, query, key, value, score_mod, block_mask, compiled=compiled, scale=scale)


def _beside(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Mod | None = None,
    block_mask: flex.BlockMask | None = None,
    scale: float | None = None,
    *_: Any,
    **__: Any,
) -> None:
    """Leave the operator in the graph. To be traced."""
    flex_compiled.beside(NAME, query, key, value, block_mask, scale, None)
