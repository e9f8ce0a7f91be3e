"""Catches every call of `torch.nn.functional.scaled_dot_product_attention`.

`nn.MultiheadAttention` with need_weights=False and "sdpa" of transformers call it too. The function is replaced for
the whole process while something is instrumented. A call outside of a model that measures goes to the original after
one branch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...statistics.rows import RowStats
from ...tracing import traced, transformed
from .. import observer, sharded, treating
from ..call import AttentionCall, Unmeasurable, hide, require_plain, why_not_fused
from ..compiled import graphed, layers, operators, slots, tracer
from ..expected import Plain
from ..patches import Patch
from . import context_parallel

NAME = "scaled_dot_product_attention"
UNDER_A_MASK = "under a mask, a probe beside PyTorch's kernel is cheaper"
ONLY_MATH = "the fused kernels of scaled_dot_product_attention are turned off"


def install(modules: Iterable[nn.Module] = ()) -> list[Patch]:
    """Replace the function, also where files of these modules imported it, until the patches are released."""
    return Patch.everywhere(functional, NAME, _interceptor, modules)


def _interceptor(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # Context parallelism of PyTorch puts a function here that exchanges keys with other processes.
    rings = context_parallel.is_wrapper(original)

    def described(*args: Any, **kwargs: Any) -> AttentionCall:
        call = call_of(observer.thread.heads, *args, **kwargs)
        observer.thread.slot_rows = None
        call.own_rows = functools.partial(_rows_of_slot, call.query.shape[:3])
        return call

    @functools.wraps(original)
    def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Tensor:
        changed = treating.current(*args, **kwargs) if treating.thread.running or treating.finders else None
        return attend(*args, **kwargs) if changed is None else changed.run(attend, True, *args, **kwargs)

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        if transformed():
            observer.list_transformed()
            output = original(*args, **kwargs)
            if traced() and not rings:
                _beside(output, *args, **kwargs)
            return output
        thread = observer.thread
        if thread.receiver is not None:
            return thread.receiver(original, *args, **kwargs)
        find = None if thread.heads is None else _announced
        if (observer.active or observer.keeping) and (rings or _by_sequence(*args, **kwargs)):
            return context_parallel.run(original, args, kwargs, find)
        return observer.run(original, args, kwargs, described, find, _plain_of)

    return scaled_dot_product_attention


def _rows_of_slot(shape: torch.Size) -> RowStats | None:
    """Statistics of the call of this shape that just ran, if this project computed it under PyTorch's flash kernel."""
    found = observer.thread.slot_rows
    return found if found is not None and found.lse.shape == shape else None


def _announced(*_: Any, **__: Any) -> observer.Owner | None:
    heads = observer.thread.heads
    return None if heads is None else heads.owner


def _plain_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Plain | None:
    if attn_mask is not None or not type(query) is type(key) is type(value) is Tensor:
        return None
    if query.is_nested or key.is_nested or value.is_nested:  # they have no sizes
        return None
    heads = observer.thread.heads
    return Plain(query, key, value, (is_causal, scale, enable_gqa, heads and heads[1:]))


def _by_sequence(query: Any = None, *_: Any, **__: Any) -> bool:
    return type(query) is not Tensor and sharded.by_sequence(query)


def _beside(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> None:
    """Leave an operator in the graph. To be traced."""
    found, heads = tracer.find_layer(query, key, value, attn_mask, numbers=(scale,), into_slot=True)
    if found is None:
        return
    query, key, value = operators.inputs(query, key, value)
    call = operators.detached(attn_mask), bool(is_causal), scale, enable_gqa, heads
    if isinstance(found, slots.Slot):
        state = found.accumulator, found.result, found.token, found.control
        graphed_operator(*state, query, key, value, output.detach(), *call)
    else:
        _operator(found, query, key, value, *call)


def _measure(
    layer: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    heads: list[int] | None,
) -> None:
    """What the operator does when its graph runs."""
    owner = layers.owner_of(layer)
    if owner is not None:
        known = None if heads is None else observer.Heads(owner, *heads)
        describe = functools.partial(
            call_of, known, query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa
        )
        operators.measure(owner, describe)


_operator = operators.operator(
    "observe_sdpa",
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, float? scale, bool enable_gqa, "
    "SymInt[]? heads",
    _measure,
)


def call_of(
    heads: observer.Heads | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    """The description of one call, from its arguments. heads: of a call that transformers makes, None for any other.

    Raises Unmeasurable for tensors that cannot be measured.
    """
    not_fused = why_not_fused(dropout_p, attn_mask) or fused_kernels_off()
    split: Any = None  # the queries, if they are a DTensor
    if heads is None and type(query) is not Tensor and sharded.is_sharded(query):
        split = query
        query, key, value, attn_mask = sharded.local(query, key, value, attn_mask)
        not_fused = sharded.NOT_FUSED
    require_plain(query=query, key=key, value=value, attn_mask=attn_mask)
    if attn_mask is not None and is_causal:
        not_fused = (
            "both attn_mask and is_causal"  # some versions of torch raise for it, and have to be called
        )
    if attn_mask is not None:
        with torch.no_grad():
            attn_mask = hide(attn_mask.detach(), query.dtype)
    query, key, value, attn_mask, shape = four_dimensional(query, key, value, attn_mask)
    if heads is not None:
        query, key, value, attn_mask = _ungroup(heads, query, key, value, attn_mask)
    elif not enable_gqa and query.shape[1] != key.shape[1]:
        if 1 not in (query.shape[1], key.shape[1]):
            raise Unmeasurable("query and key have different heads without enable_gqa")
        most = max(query.shape[1], key.shape[1])
        query, key, value = (x.expand(-1, most, -1, -1) for x in (query, key, value))

    def output_of(out: Tensor) -> Tensor | None:
        mine = out if split is None else sharded.own_part(out, split)
        return None if mine is None else mine.reshape(*query.shape[:3], mine.shape[-1])

    return AttentionCall(
        query=query,
        key=key,
        value=value,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        softcap=None,
        sinks=None,
        interceptor=NAME if heads is None else "transformers sdpa",
        from_output=lambda out: out if len(shape) == 3 else out.reshape(*shape, out.shape[-1]),
        not_fused=not_fused,
        output_of=output_of,
        # A mask slows our kernels by more than a probe beside PyTorch's costs.
        probe_preferred=None if attn_mask is None else UNDER_A_MASK,
    )


graphed_operator = graphed.operator("measure_sdpa", call_of)


def fused_kernels_off() -> str | None:
    """Why the user's choice of SDPA's kernels leaves the output to PyTorch, None if it does not.

    Our kernel takes the place of a fused one. Which of PyTorch's fused ones are allowed decides about the backward.
    """
    allowed = torch.backends.cuda
    if allowed.flash_sdp_enabled() or allowed.mem_efficient_sdp_enabled() or allowed.cudnn_sdp_enabled():
        return None
    return ONLY_MATH


def four_dimensional(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[int, ...]]:
    """(B, H, rows, C) tensors, a mask that broadcasts to them, and the output's shape without its last size.

    scaled_dot_product_attention takes any number of leading sizes and broadcasts them. (M, D) and (B, M, D) have one
    head.
    """
    dims = query.dim()
    if dims == key.dim() == value.dim() == 4 and query.shape[0] == key.shape[0] == value.shape[0]:
        # Nearly every model's shapes. The general case below costs the host ten times more.
        shape = query.shape[0], max(query.shape[1], key.shape[1], value.shape[1]), query.shape[2]
        return query, key, value, attn_mask, shape
    tensors = [query, key, value]
    if dims < 2 or key.dim() != dims or value.dim() != dims:
        raise Unmeasurable(f"query, key and value have {[x.dim() for x in tensors]} dimensions")
    if dims < 4:
        tensors = [x[None, None] if dims == 2 else x[:, None] for x in tensors]
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask[:, None]
    batch = torch.broadcast_shapes(*(x.shape[:-3] for x in tensors))
    heads = max(x.shape[-3] for x in tensors)
    sizes: tuple[int, ...] = (*batch, heads, query.shape[-2])
    if dims < 4:
        sizes = (*batch[: dims - 2], query.shape[-2])
    if attn_mask is not None and attn_mask.dim() > 3 and len(batch) > 1:
        attn_mask = attn_mask.expand(*batch, *attn_mask.shape[-3:]).flatten(0, len(batch) - 1)
    query, key, value = (x.expand(*batch, *x.shape[-3:]).flatten(0, len(batch) - 1) for x in tensors)
    return query, key, value, attn_mask, sizes


def _ungroup(
    heads: observer.Heads, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Undo what transformers does to grouped-query heads, so that each query head is measured by itself.

    transformers repeats the key heads, or packs the query heads of a group into the rows of one head if there is one
    query token.
    """
    group = heads.query // heads.key
    if query.shape[1] != heads.query:
        query = query.reshape(query.shape[0], heads.query, 1, query.shape[3])
        if attn_mask is not None and attn_mask.shape[1] != 1:
            attn_mask = attn_mask.reshape(attn_mask.shape[0], heads.query, 1, attn_mask.shape[3])
    if key.shape[1] == heads.query:
        key, value = key[:, ::group], value[:, ::group]
    return query, key, value, attn_mask
