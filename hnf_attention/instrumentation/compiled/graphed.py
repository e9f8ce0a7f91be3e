"""The operator by which a compiled graph measures its attention itself, so that CUDA graphs may replay it.

It declares that it writes into a layer's slot. A compiler therefore keeps it at its place, where query, key, value and
output are not overwritten yet. When a CUDA graph replays it, no Python runs: its launches ask the slot's control.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...compat import dynamo
from ...engine import graphed as engine
from ...engine.graphed import State
from .. import observer
from ..call import COMPILED, AttentionCall
from ..graph_reader import GraphKind
from ..padding import is_cross
from . import layers, slots

NOT_SDPA = "a compiled graph calls it by another function than scaled_dot_product_attention"
NO_MODULE = "a compiled graph calls it behind a graph break"
NOT_FOUR = "a compiled graph calls it with tensors that have not four dimensions, or with symbolic heads"
UNTOLD = "a compiled function runs it without grad, and nobody sees whether its forwards are evaluation"
CROSS = "in a compiled graph, the padding of its queries is not known"
_AUTOCAST = (torch.float16, torch.bfloat16, torch.float32)


def slot(
    asked: dynamo.Frame, owner: observer.Owner, heads: Any, has_module: bool
) -> tuple[str | None, str | None]:
    """(the name of the layer's slot for the call that is traced, None for none; why there is none).

    asked: the frame of `find_layer`. heads: Dynamo's variable of the heads that were announced, None for none.
    """
    if not dynamo.constant_of(asked.local("into_slot")):
        return None, NOT_SDPA
    if not has_module:
        return None, NO_MODULE
    if is_cross(owner.layer):
        return None, CROSS
    if not torch.is_grad_enabled() and not owner.observer.in_forward:
        return None, UNTOLD
    query, key, value, _mask = dynamo.items(asked.local("tensors"))
    tensors = [dynamo.example_of(x) for x in (query, key, value)]
    number = tensors[0].shape[1] if heads is None else dynamo.constant_of(heads)[0]
    sizes = number, *(x.shape[-1] for x in tensors)
    if any(x.dim() != 4 for x in tensors) or not all(type(size) is int for size in sizes):
        return None, NOT_FOUR
    if heads is None and tensors[1].shape[1] != number:
        number = max(number, tensors[1].shape[1])
    refused = engine.refuses(tensors[0], tensors[2])
    if refused is not None:
        return None, f"in a compiled graph: {refused}"
    device, dtype = tensors[0].device, tensors[0].dtype
    if torch.is_autocast_enabled(device.type) and dtype in _AUTOCAST:
        dtype = torch.get_autocast_dtype(device.type)
    kind = GraphKind(owner.layer, number, sizes[1], dtype, device)
    return layers.slot(owner.module, kind), None


def _measure(
    accumulator: Tensor,
    result: Tensor,
    token: Tensor,
    control: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    heads: list[int] | None,
    describe: Callable[..., AttentionCall],
) -> None:
    """What the operator does when its graph runs, or while a CUDA graph is captured."""
    slot = slots.of(token)
    if slot is not None:
        known = None if heads is None else tuple(heads)
        rest = is_causal, scale, enable_gqa, known
        described = partial(_described, describe, known, query, key, value, attn_mask, *rest[:3])
        state, tensors = State(accumulator, result, control), (query, key, value, out)
        slot.measure(state, tensors, attn_mask, rest, described)


def _described(
    describe: Callable[..., AttentionCall],
    heads: tuple[int, ...] | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> AttentionCall:
    known = None if heads is None else observer.Heads(None, *heads)
    call = describe(known, query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa)
    call.not_fused = call.place = COMPILED
    return call


def operator(name: str, describe: Callable[..., AttentionCall]) -> Callable[..., None]:
    """Define the operator. describe: makes the description of a call, as `call_of` of the interceptor does."""
    name = f"hnf_attention::{name}"
    torch.library.define(
        name,
        "(Tensor(a!) accumulator, Tensor(b!) result, Tensor token, Tensor control, Tensor query, Tensor key, "
        "Tensor value, Tensor out, Tensor? attn_mask, bool is_causal, float? scale, bool enable_gqa, "
        "SymInt[]? heads) -> ()",
        tags=[torch.Tag.flexible_layout],
    )
    torch.library.impl(name, "CompositeExplicitAutograd", partial(_measure, describe=describe))
    torch.library.register_fake(name, lambda *_, **__: None)
    return getattr(torch.ops.hnf_attention, name.rpartition(":")[2]).default
