"""Attention functions that a user names: `register_interceptor`, and how their calls are described."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .call import AttentionCall, require_plain
from .patches import original_of

NOT_FUSED = "a registered function keeps its own output"
_BUILT_IN = ("torch.nn.functional", "torch.nn.attention.flex_attention")


@dataclass(frozen=True, eq=False)
class CallDescription:
    """One call of an attention function, in the words of `hnf_attention.attention`.

    query (B, H, M, D), key (B, H_kv, N, D), value (B, H_kv, N, D_v): of one floating dtype; views of the model's
    tensors.
    attn_mask, is_causal, scale, window_size, softcap, sinks, seqlens: as `attention` takes them. `is_causal` is aligned
        to the top left. For a causal mask that is aligned to the bottom right, with M other than N, give a mask.
    output: makes the output (B, H, M, D_v) of what the function returns, where NaN and inf are to be looked for in it.
    lse: makes lse (B, H, M), in nats, of what the function returns. It is compared with ours, once per layer. A layer
        where they differ is listed, not measured.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None
    window_size: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    seqlens: Tensor | None = None
    output: Callable[[Any], Tensor | None] | None = None
    lse: Callable[[Any], Tensor | None] | None = None


class RegisteredInterceptor:
    """What `register_interceptor` returns.

    path: of the function. describe: makes the description of a call. `unregister()` ends it, and so does leaving its
    `with` block.
    """

    def __init__(self, path: str, describe: Callable[..., CallDescription]):
        self.path, self.describe = path, describe

    def __repr__(self) -> str:
        state = "registered" if _registered.get(self.path) is self else "unregistered"
        return f"RegisteredInterceptor({self.path!r}, {state})"

    def unregister(self) -> None:
        """Leave the function out of every later instrumentation. A second call does nothing."""
        if _registered.get(self.path) is self:
            del _registered[self.path]

    def __enter__(self) -> RegisteredInterceptor:
        return self

    def __exit__(self, *_: object) -> None:
        self.unregister()

    def call_of(self, *args: Any, **kwargs: Any) -> AttentionCall:
        """The call that the function is given. Raises TypeError if `describe` returns no CallDescription."""
        with torch.no_grad():
            found = self.describe(*args, **kwargs)
        if not isinstance(found, CallDescription):
            raise TypeError(
                f"expected the description of {self.path} to be a CallDescription, got {type(found).__name__}"
            )
        require_plain(query=found.query, key=found.key, value=found.value, attn_mask=found.attn_mask)
        return AttentionCall(
            query=found.query,
            key=found.key,
            value=found.value,
            attn_mask=found.attn_mask,
            is_causal=found.is_causal,
            scale=found.scale,
            softcap=found.softcap,
            sinks=found.sinks,
            window_size=found.window_size,
            seqlens=found.seqlens,
            interceptor=self.path,
            from_output=lambda out: out,  # never asked for
            not_fused=NOT_FUSED,
            probe_preferred=NOT_FUSED,
            output_of=found.output,
            lse_of=found.lse,
            casts=False,
        )


_registered: dict[str, RegisteredInterceptor] = {}
#: The last one of each path. Models that are instrumented when it is unregistered go on with it.
_latest: dict[str, RegisteredInterceptor] = {}


def registered() -> list[RegisteredInterceptor]:
    """The interceptors that are registered now."""
    return list(_registered.values())


def call_of(path: str, /, *args: Any, **kwargs: Any) -> AttentionCall:
    """The call of the function at `path`, by the description that was registered last."""
    return _latest[path].call_of(*args, **kwargs)


def register_interceptor(
    function: str | Callable[..., Any], describe: Callable[..., CallDescription]
) -> RegisteredInterceptor:
    """Measure the calls of an attention function that this package does not know, in every model instrumented later.

    function: where the function is: "package.module.name", or "package.module.Class.name" for a method, or the function
        itself. While a model is instrumented, it is replaced there, in every imported file that holds it by any name,
        and in the attributes of the model's modules.
    describe: gets the arguments of each measured call and returns its `CallDescription`. It should make views, and
        read no number of a tensor, for which the host would wait. It may raise `Unmeasurable(reason)`: the call is then
        listed in `coverage` with that reason.

    The function computes its output as before, in every mode: such calls are probed. A compiled graph describes a call
    when it runs. It can give `describe` tensors, numbers, text, None, and tuples of these; calls with anything else are
    listed there.

    Returns a handle, whose `unregister()` ends it. Models that are instrumented then stay so, and take a description
    that is registered later.
    Raises TypeError if `function` is neither text nor a Python function or `describe` is not callable. Raises
    ImportError or AttributeError if there is no such function. Raises ValueError for one that is registered already,
    that cannot be found where it says it is, or that is a function of PyTorch which is measured without it.
    """
    if not callable(describe):
        raise TypeError(f"expected describe to be a function, got {type(describe).__name__}")
    path = function if isinstance(function, str) else _path_of(function)
    place, name = find(path)
    target = getattr(place, name)
    if not callable(target) or isinstance(target, type | MethodType):
        raise TypeError(f"expected {path} to be a function, got {type(target).__name__}")
    if not isinstance(function, str) and original_of(target) is not original_of(function):
        raise ValueError(f"expected a function that is found as {path}, got another one than lies there")
    if path.rpartition(".")[0] in _BUILT_IN or target is functional.scaled_dot_product_attention:
        raise ValueError(f"expected a function that is not measured without it, got {path}")
    if path in _registered:
        raise ValueError(f"expected a function that is not registered yet, got {path}: unregister it first")
    _registered[path] = _latest[path] = RegisteredInterceptor(path, describe)
    return _registered[path]


def _path_of(function: Any) -> str:
    names = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if None in names:
        raise TypeError(
            f"expected function to be a Python function or its path, got {type(function).__name__}"
        )
    return ".".join(map(str, names))


def find(path: str) -> tuple[Any, str]:
    """The module or class that holds what `path` names, and its last name. Imports the module.

    Raises ImportError or AttributeError if there is no such thing, ValueError for a path without a dot.
    """
    module_name, *names = path.split(".")
    if not names:
        raise ValueError(f'expected a path like "package.module.function", got {path!r}')
    place: Any = importlib.import_module(module_name)
    while len(names) > 1 and isinstance(place, ModuleType):
        module_name = f"{module_name}.{names[0]}"
        try:
            place = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name != module_name:  # the module is there, and lacks something else
                raise
            break
        del names[0]
    place = functools.reduce(getattr, names[:-1], place)
    if not hasattr(place, names[-1]):
        raise AttributeError(f"expected a function at {path!r}, got no {names[-1]!r} in {place!r}")
    return place, names[-1]
