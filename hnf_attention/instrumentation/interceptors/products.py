"""Sees products of matrices, under every name that models write them by: they tell which softmax is attention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ... import compat
from ...tracing import transformed
from .. import evidence, observer
from ..patches import Patch

_NAMES = {
    torch: ("matmul", "mm", "bmm", "baddbmm", "einsum"),
    torch.Tensor: ("matmul", "__matmul__", "mm", "bmm", "baddbmm"),
    torch.functional: ("einsum",),
}


def install(modules: Iterable[nn.Module]) -> list[Patch]:
    """Replace the functions, also where files of these modules imported them, until the patches are released."""
    modules = list(modules)
    # As with F.softmax: a function of Python is pickled by its name, which must lead to it.
    held = any(value is torch.einsum for module in modules for value in vars(module).values())
    return [
        patch
        for place, names in _NAMES.items()
        for name in names
        if not (held and name == "einsum")
        for patch in Patch.everywhere(place, name, _interceptor, modules)
    ]


def _interceptor(original: Callable[..., Any]) -> Callable[..., Any]:
    look = functools.partial(_look, _of_einsum if original.__name__ == "einsum" else _last_two)

    @functools.wraps(original)
    def product(*args: Any, **kwargs: Any) -> Any:
        # Asked first: a compiler would guard its graph by what is active.
        if torch.compiler.is_compiling() or not observer.active or observer.thread.suspended:
            return original(*args, **kwargs)
        thread = observer.thread
        thread.suspended = True  # one name calls another
        try:
            result = original(*args, **kwargs)
            # Inside a backward it is the second forward of a checkpoint.
            if not transformed() and thread.receiver is None and compat.running_backward() == -1:
                evidence.guarded(look, result, args, kwargs)
        finally:
            thread.suspended = False
        return result

    return product


def _look(
    factors: Callable[..., tuple[Tensor, Tensor] | None],
    result: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    found = factors(*args, **kwargs)
    if found is not None and isinstance(result, Tensor) and not compat.jit_trace():
        evidence.saw_product(*found, result)


def _last_two(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor] | None:
    """The factors of matmul, mm, bmm and baddbmm, which adds them to its first argument."""
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    return (tensors[-2], tensors[-1]) if len(tensors) > 1 else None


def _of_einsum(*args: Any, **_: Any) -> tuple[Tensor, Tensor] | None:
    """The two factors of an einsum. The second one has the last dimension of the result, as far as it can be told."""
    tensors = [
        x
        for arg in args
        for x in (arg if isinstance(arg, (list, tuple)) else (arg,))
        if isinstance(x, Tensor)
    ]
    if len(tensors) != 2:
        return None
    first, second = tensors
    if isinstance(args[0], str):
        inputs, output = (*args[0].replace(" ", "").split("->"), "")[:2]
        one, other = inputs.split(",")
        if output and output[-1] in one and output[-1] not in other:
            first, second = second, first
    return first, second
