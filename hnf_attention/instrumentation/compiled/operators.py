"""The operators that stand beside attention in a compiled graph, and measure it when the graph runs.

An operator declares that it writes to the layer's tensor. A compiler therefore keeps it in the graph. It has no
gradient. A checkpoint may run it a second time, in a backward: there it does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...engine.call import autocast
from .. import observer
from ..call import COMPILED, AttentionCall
from . import layers


def operator(name: str, schema: str, measure: Callable[..., None]) -> Callable[..., None]:
    """Define an operator `(Tensor(a!) layer, <schema>) -> ()` that runs `measure` when its graph runs.

    By the plain functions of torch.library: with `custom_op`, a run that measures nothing costs several times more.
    """
    unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)  # it runs Python: a CUDA graph is cut around it
    tags = [torch.Tag.flexible_layout] + [unsafe] * (unsafe is not None)
    name = f"hnf_attention::{name}"
    torch.library.define(name, f"(Tensor(a!) layer, {schema}) -> ()", tags=tags)
    torch.library.impl(name, "CompositeExplicitAutograd", measure)
    torch.library.register_fake(name, lambda *_, **__: None)
    return getattr(torch.ops.hnf_attention, name.rpartition(":")[2]).default


def measure(owner: observer.Owner, describe: Callable[[], AttentionCall]) -> None:
    """Measure the call that `describe` describes. The compiled graph computes its output."""

    def described() -> AttentionCall:
        call = describe()
        call.not_fused = call.place = COMPILED
        return call

    owner.observer.attend(owner.layer, described, lambda: None)


def _list_unmeasured(layer: Tensor, reason: str) -> None:
    owner = layers.owner_of(layer)
    if owner is not None:
        owner.observer.note(owner.layer, f"a compiled graph calls it with {reason}")


#: Lists the layer, with the reason, whenever the graph runs.
unmeasured = operator("list_unmeasured", "str reason", _list_unmeasured)


def inputs(query: Tensor, key: Tensor, value: Tensor) -> tuple[Any, ...]:
    """These tensors as the attention beside the operator takes them. Autocast does not reach into a compiled graph."""
    return autocast(query.detach(), key.detach(), value.detach())


def detached(tensor: Tensor | None) -> Tensor | None:
    """The tensor outside autograd."""
    return None if tensor is None else tensor.detach()
