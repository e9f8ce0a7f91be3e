"""What else runs a call: a compiler, a transform of torch.func, a dispatch mode, a trace."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from . import compat

_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter, torch.nn.Buffer, type(None)})
_NO_CONTEXT = nullcontext()


def running_modules() -> Iterator[nn.Module]:
    """The modules whose calls run on this thread, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is compat.module_call_code:
            yield frame.f_locals["self"]
        frame = frame.f_back


def transformed() -> bool:
    """Whether a compiler or a transform of torch.func runs the call. Its tensors then have no numbers to measure."""
    return (
        torch.compiler.is_compiling()
        or compat.functorch_transform()
        # Dynamo keeps some calls whole. They run when their graph is lowered (torch 2.11 and later). That is done
        # under dispatch modes, and to ask for these is ten times cheaper.
        or (compat.dispatch_modes() > 0 and compat.lowered_graph() is not None)
    )


def traced() -> bool:
    """Whether Dynamo traces the call, into a graph that will run in its place."""
    return torch.compiler.is_dynamo_compiling()


def captured() -> bool:
    """Whether the call's CUDA stream is captured into a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def functional() -> bool:
    """Whether a transform of torch.func runs the call, or will run the graph that Dynamo traces."""
    return compat.functorch_transform()


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether forward-mode differentiation sees one of the tensors; in a trace or a transform it may see any."""
    if compat.current_level() < 0:
        return False
    if traced():
        return True
    if not compat.forward_mode_enabled():
        return False
    if functional():
        return True
    unpack = torch.autograd.forward_ad.unpack_dual
    return any(x is not None and unpack(x).tangent is not None for x in tensors)


def untraced(*tensors: Tensor | None) -> bool:
    """Whether autograd alone sees the call, so that it can do without the operators of torch.library.

    An operator costs the host some 50 microseconds a call. Compilers, transforms and dispatch modes need it.
    """
    if transformed():
        return False
    seen = compat.dispatch_modes() or compat.jit_trace() is not None or compat.current_level() >= 0
    return not seen and all(type(x) in _PLAIN_TYPES for x in tensors)


def without_dispatch_modes() -> AbstractContextManager[Any]:
    """Hide the operators inside from dispatch modes: a selective checkpoint counts the operators that it sees."""
    return compat.without_dispatch_modes() if compat.dispatch_modes() else _NO_CONTEXT


def without_tangents() -> AbstractContextManager[Any]:
    """Hide the operators inside from forward-mode differentiation."""
    return compat.without_forward_mode(False) if compat.current_level() >= 0 else _NO_CONTEXT


def readable(tensor: Tensor) -> bool:
    """Whether the host can read the tensor's numbers without waiting for another device."""
    return tensor.device.type == "cpu" and untraced(tensor)
