"""Catches `nn.MultiheadAttention`, and the Transformer layers made of it, where they pass SDPA by.

With need_weights=False it calls scaled_dot_product_attention, which has an interceptor of its own. With
need_weights=True it multiplies by hand. Such a call keeps its own arithmetic. Its description comes from a second run
without weights, which stops at the arguments of scaled_dot_product_attention: PyTorch's own code has projected, added
biases and merged masks by then. In inference, `nn.MultiheadAttention`, `nn.TransformerEncoderLayer` and
`nn.TransformerEncoder` may call one C++ function for everything. Inside a model that measures they are told that this
fast path is off.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...tracing import traced, transformed
from .. import observer, treating
from ..call import AttentionCall
from ..compiled import tracer
from ..patches import Patch
from . import sdpa

FORWARD = "multi_head_attention_forward"
FAST_PATH = "get_fastpath_enabled"
INTERCEPTOR = "nn.MultiheadAttention with weights"
_NEED_WEIGHTS, _IS_CAUSAL = 15, 24  # places among the arguments of multi_head_attention_forward


def install() -> list[Patch]:
    """Replace both functions until the patches are released."""
    return [
        *Patch.everywhere(functional, FORWARD, _forward_interceptor, ()),
        *Patch.everywhere(torch.backends.mha, FAST_PATH, _fast_path_interceptor, ()),
    ]


def _fast_path_interceptor(original: Callable[[], bool]) -> Callable[[], bool]:
    @functools.wraps(original)
    def get_fastpath_enabled() -> bool:
        if treating.thread.running or treating.finders:
            return False
        if transformed():
            # With gradients enabled, PyTorch does not take the fast path.
            slowed = original() and not torch.is_grad_enabled()
            if traced():
                return original() and tracer.find_layer(slowed=slowed)[0] is None
            if slowed:
                observer.list_transformed()
            return original()
        if torch.jit.is_scripting() or not original():
            return original()
        owner = observer.measuring_owner()
        if owner is None:
            return True
        if not torch.is_grad_enabled():  # with gradients, PyTorch does not take the fast path
            owner.observer.note_slowed(owner.layer)
        return False

    return get_fastpath_enabled


def _forward_interceptor(original: Callable[..., Any]) -> Callable[..., Any]:
    # Dynamo puts this function into a graph without tracing it. It traces a copy.
    opened = FunctionType(original.__code__, original.__globals__, original.__name__, original.__defaults__)
    opened.__kwdefaults__ = original.__kwdefaults__
    described = functools.partial(_described, original)

    @functools.wraps(original)
    def multi_head_attention_forward(*args: Any, **kwargs: Any) -> Any:
        if transformed():
            if traced() and tracer.find_layer()[0] is not None:
                return opened(*args, **kwargs)
            observer.list_transformed()
            return original(*args, **kwargs)
        if not _weights_wanted(args, kwargs):
            return original(*args, **kwargs)
        return observer.run(original, args, kwargs, described)

    return multi_head_attention_forward


def _weights_wanted(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return args[_NEED_WEIGHTS] if len(args) > _NEED_WEIGHTS else kwargs.get("need_weights", True)


@contextmanager
def _receiving(receiver: Callable[..., Any]) -> Iterator[None]:
    """Hand this thread's calls of scaled_dot_product_attention inside to `receiver`, as `observer.thread` says."""
    thread = observer.thread
    before, thread.receiver = thread.receiver, receiver
    try:
        yield
    finally:
        thread.receiver = before


class _Reached(BaseException):
    """Stops a call of multi_head_attention_forward at its attention. No handler of errors may catch it."""


def _output(result: Any) -> Tensor:
    """(B, 1, M, E) of the result (M, B, E) or (M, E), in which the heads are joined."""
    out = result[0]
    return out[None, None] if out.dim() == 2 else out.transpose(0, 1)[:, None]


@torch.no_grad()
def _described(original: Callable[..., Any], *given: Any, **kwargs: Any) -> AttentionCall:
    """The description of the attention in a call of `multi_head_attention_forward`, which is not computed."""
    args = list(given)
    # With weights, the mask alone decides. Without them, is_causal may take the place of the mask.
    for place, name in ((_NEED_WEIGHTS, "need_weights"), (_IS_CAUSAL, "is_causal")):
        if len(args) > place:
            args[place] = False
        else:
            kwargs = kwargs | {name: False}
    found: list[AttentionCall] = []

    def receive(_original: Callable[..., Any], *call: Any, **options: Any) -> Any:
        found.append(sdpa.call_of(None, *call, **options))
        raise _Reached

    # Autocast keeps a weight that it casts, here without its history. The call itself must not be given that copy.
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with _receiving(receive), suppress(_Reached):
            original(*args, **kwargs)
    finally:
        torch.set_autocast_cache_enabled(cached)
    (call,) = found
    call.interceptor = INTERCEPTOR
    call.output_of = _output
    call.not_fused = call.not_fused or "attention weights are asked for"
    return call
