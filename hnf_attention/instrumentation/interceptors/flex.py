"""The fifth interceptor: every call of `torch.nn.attention.flex_attention.flex_attention`.

Users mostly call what torch.compile made of it, before anything was instrumented. Calling that runs no Python
of PyTorch's that could be replaced, so the compiled function itself is, where the files or the classes of the
model's modules hold it. One that a module holds itself stays, as the model is not changed; it is listed.
Inside a model that is compiled an operator beside the call measures it.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex

from ...tracing import traced, transformed
from .. import observer
from ..call import AttentionCall
from ..compiled import flex as flex_compiled
from ..patches import Patch, classes, namespaces
from .flex_call import Mod, described

NAME = "flex_attention"
_COMPILED = "_torchdynamo_orig_callable"  # what torch.compile leaves on the function that it returns


def install(modules: Iterable[nn.Module]) -> list[Patch]:
    """Put the interceptor in place, also where files and classes of these modules hold the function, until released."""
    patches = Patch.everywhere(flex, NAME, functools.partial(_interceptor, compiled=False), modules)
    for read, write in _held_by_files_and_classes(modules):
        compiled = hasattr(read(), _COMPILED)
        patches.append(Patch.acquire(read, write, functools.partial(_interceptor, compiled=compiled)))
    return patches


def unreachable(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """By the names of modules that hold a flex_attention in an attribute of theirs: that it is not measured."""
    return {
        layer: f"its attribute {name!r} is a flex_attention that is called past every replacement; "
        "only one that its file or its class holds is measured"
        for layer, module in modules.items()
        for name, value in vars(module).items()
        if _is_flex(value)
    }


def _is_flex(value: Any) -> bool:
    """Whether it is the function, ours in its place, or a compiled one of either."""
    return isinstance(value, FunctionType) and inspect.unwrap(value) is inspect.unwrap(flex.flex_attention)


def _held_by_files_and_classes(modules: Iterable[nn.Module]) -> Iterator[tuple[Callable, Callable]]:
    """How to read and write each place, but for the globals that Patch.everywhere knows."""
    for space in namespaces(modules):
        for name, value in list(space.items()):
            if _is_flex(value) and hasattr(value, _COMPILED):
                yield (
                    functools.partial(operator.getitem, space, name),
                    functools.partial(operator.setitem, space, name),
                )
    for cls in classes(modules):
        for name, value in list(vars(cls).items()):
            static = isinstance(value, staticmethod)
            if _is_flex(value.__func__ if static else value):
                yield functools.partial(getattr, cls, name), functools.partial(_set, cls, name, static)


def _set(cls: type, name: str, static: bool, function: Callable) -> None:
    setattr(cls, name, staticmethod(function) if static else function)


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

    # What torch.compile left on the original: Dynamo would trace that in place of the interceptor.
    flex_attention.__dict__.pop("_torchdynamo_inline", None)
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
    """flex_attention's arguments as one call; those that change no score are left out."""
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
    """Leave the operator in the graph; traced."""
    flex_compiled.beside(NAME, query, key, value, block_mask, scale, None)
