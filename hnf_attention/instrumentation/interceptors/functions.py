"""Catches the calls of attention functions that are described by their arguments alone.

Each interceptor of such a library names its functions, and says how one of their calls is described.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ...tracing import traced, transformed
from .. import observer
from ..call import AttentionCall
from ..compiled import operators, tracer


def interceptor(
    library: str, describe: Callable[..., AttentionCall], original: Callable[..., Any]
) -> Callable[..., Any]:
    """The replacement of `original`. In a compiled graph its calls are listed, with the name of the library.

    describe: makes a call's description, from the arguments.
    """

    @functools.wraps(original)
    def attend(*args: Any, **kwargs: Any) -> Any:
        if transformed():
            if traced():
                _list(library)
                return tracer.announced(None, original, args, kwargs)
            observer.list_transformed()
            return original(*args, **kwargs)
        return observer.run(original, args, kwargs, describe)

    return attend


def _list(library: str) -> None:
    """Leave an operator in the graph that lists the layer. To be traced."""
    layer, _ = tracer.find_layer()
    if layer is not None:
        operators.unmeasured(layer, f"{library}, which is measured outside of compiled graphs only")
