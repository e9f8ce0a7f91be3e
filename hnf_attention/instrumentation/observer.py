"""Who is measured: which module belongs to which instrumentation, and what runs in this thread.

Everything here is weak: neither a model nor an instrumentation is kept alive by being known here.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    from .call import AttentionCall
    from .handle import Instrumentation

_MODULE_CALL = nn.Module._call_impl.__code__

_owners: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref, str]] = weakref.WeakKeyDictionary()
TRANSFORMED = "it runs inside a transform of torch.func"
#: ids of the instrumentations that measure now: empty, and every interceptor leads to the original.
measuring: set[int] = set()


class Owner(NamedTuple):
    instrumentation: Instrumentation
    layer: str  # the module's name in the instrumented model
    module: nn.Module


class Heads(NamedTuple):
    """Numbers of heads that a model gave to the Hugging Face interface, which may re-arrange them."""

    owner: Owner
    query: int
    key: int


class _Thread(threading.local):
    """What the call that is running on this thread has said of itself; whoever sets it puts it back."""

    suspended = False  # attention inside is part of a call that is being measured already
    heads: Heads | None = None  # of the scaled_dot_product_attention inside
    # Where attention inside is not an instrumentation's: what takes (original, *arguments) of a call of
    # scaled_dot_product_attention, and what takes the description of one that computes its own weights.
    receiver: Callable[..., Any] | None = None
    probe: Callable[[AttentionCall], None] | None = None


thread = _Thread()


def register(modules: dict[str, nn.Module], instrumentation: Instrumentation) -> None:
    """Make `instrumentation` the owner of these modules."""
    reference = weakref.ref(instrumentation)
    for name, module in modules.items():
        _owners[module] = (reference, name)


def forget(module: nn.Module) -> None:
    _owners.pop(module, None)


def owner(module: nn.Module) -> Owner | None:
    """The instrumentation of this very module (a deep copy of it has none)."""
    entry = _owners.get(module)
    instrumentation = None if entry is None else entry[0]()
    return None if instrumentation is None else Owner(instrumentation, entry[1], module)


def owned(instrumentation: Instrumentation) -> list[nn.Module]:
    """The modules of an instrumentation that are still alive."""
    return [module for module, (reference, _) in list(_owners.items()) if reference() is instrumentation]


def run(
    original: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
    describe: Callable[..., AttentionCall],
    find: Callable[..., Owner | None] | None = None,
) -> Any:
    """Run an intercepted attention call `original(*args, **kwargs)`, measured where somebody measures it.

    describe: makes the call's description, of the same arguments. find: whose it is, as for `measurer`.
    """
    # Steps that are not measured pay for this branch.
    owner = measurer(find, *args, **kwargs) if measuring else None
    if owner is None:
        return original(*args, **kwargs)
    build, plain = partial(describe, *args, **kwargs), partial(original, *args, **kwargs)
    return owner.instrumentation.attend(owner.layer, build, plain)


def measurer(find: Callable[..., Owner | None] | None = None, /, *args: Any, **kwargs: Any) -> Owner | None:
    """Who measures the attention that is called here; None where nobody does.

    find: whose the call with these arguments is; where it is left out, the running module's owner's.
    """
    if not measuring or thread.suspended or thread.receiver is not None or torch._C._get_tracing_state():
        return None
    found = running_owner() if find is None else find(*args, **kwargs)
    return found if found is not None and found.instrumentation.measuring else None


def list_transformed(find: Callable[..., Owner | None] | None = None, /, *args: Any, **kwargs: Any) -> None:
    """List the call that runs here where it is a transform of torch.func's: its tensors are none to measure.

    find: whose it is, as for `measurer`.
    """
    in_a_compiler = torch.compiler.is_compiling() or torch._guards.TracingContext.try_get() is not None
    found = None if in_a_compiler else measurer(find, *args, **kwargs)
    if found is not None:
        found.instrumentation.note(found.layer, TRANSFORMED)


def running_owner(which: Callable[[nn.Module], bool] | None = None) -> Owner | None:
    """The owner of the innermost instrumented module whose call is on this thread's Python stack.

    which: of the innermost one of which this is true.
    The stack is right where a hook is not: in the recomputation of a checkpoint, in autograd's
    threads, and after an exception. Only frames of `nn.Module._call_impl` are opened.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _MODULE_CALL:
            module = frame.f_locals["self"]
            found = owner(module)
            if found is not None and (which is None or which(module)):
                return found
        frame = frame.f_back
    return None
