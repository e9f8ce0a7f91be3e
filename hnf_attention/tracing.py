"""Whether something watches a call that must see operators, and may not see numbers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter, torch.nn.Buffer, type(None)})


def transformed() -> bool:
    """Whether a compiler or a functorch transform runs the call: its tensors are none to measure."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        # What Dynamo keeps as one call is opened when its graph is lowered, by running it (seen in torch 2.11).
        or torch._guards.TracingContext.try_get() is not None
    )


def traced() -> bool:
    """Whether Dynamo traces the call, into a graph that will run in its place."""
    return torch.compiler.is_dynamo_compiling()


def untraced(*tensors: Tensor | None) -> bool:
    """Whether nothing but autograd watches this call, so that it need not pass through torch.library.

    The operators cost some 50 microseconds of the host's time a call; they are there for what traces,
    transforms or intercepts the call.
    """
    if transformed():
        return False
    watched = (
        torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )
    return not watched and all(type(x) in _PLAIN_TYPES for x in tensors)


def unwatched() -> AbstractContextManager:
    """Operators inside are seen by no dispatch mode: selective checkpointing would miss them in its second forward."""
    return _disable_current_modes() if torch._C._len_torch_dispatch_stack() else _NOTHING


_NOTHING = nullcontext()


def readable(tensor: Tensor) -> bool:
    """Whether its numbers can be looked at: not those on another device, for which the host would wait."""
    return tensor.device.type == "cpu" and untraced(tensor)
