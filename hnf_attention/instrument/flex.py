"""The fifth door: every call of `torch.nn.attention.flex_attention.flex_attention`.

Users mostly call what torch.compile made of it, before anything was instrumented. Calling that runs no Python
of PyTorch's that could be replaced, so the compiled function itself is, where the files or the classes of the
model's modules hold it. One that a module holds itself stays, as the model is not changed; it is listed.

Scores are changed and hidden by functions of (batch, head, query, key), which PyTorch's own `create_mask`
evaluates at every place: the keys that a BlockMask leaves once, into a boolean mask of up to MASK_ELEMENTS
bytes, or else, as scores under a score_mod are, chunk by chunk of the rows.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex

from .. import masks
from ..tracing import transformed
from . import owners
from .call import AttentionCall, Unmeasurable, require_plain
from .patches import Patch, classes, namespaces
from .scores import NEVER_A_SCORE

NAME = "flex_attention"
NOT_FUSED = "flex_attention keeps its own output"
MASK_ELEMENTS = 1 << 28
_COMPILED = "_torchdynamo_orig_callable"  # what torch.compile leaves on the function that it returns

_Mod = Callable[..., Tensor]  # (batch, head, query, key), after a score if it is a score_mod


def install(modules: Iterable[nn.Module]) -> list[Patch]:
    """Put the door in place, also where files and classes of these modules hold the function, until released."""
    patches = Patch.everywhere(flex, NAME, functools.partial(_door, compiled=False), modules)
    for read, write in _held_by_files_and_classes(modules):
        compiled = hasattr(read(), _COMPILED)
        patches.append(Patch.acquire(read, write, functools.partial(_door, compiled=compiled)))
    return patches


def unreachable(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """By the names of modules that hold a flex_attention in an attribute of theirs: that it is not measured."""
    return {
        layer: f"its attribute {name!r} is a flex_attention that is called past every replacement; "
        "only one that its file or its class holds is measured"
        for layer, module in modules.items()
        for name, value in vars(module).items()
        if _is_flex(value)
    }


def _is_flex(value: Any) -> bool:
    """Whether it is the function, ours in its place, or a compiled one of either."""
    return isinstance(value, FunctionType) and inspect.unwrap(value) is inspect.unwrap(flex.flex_attention)


def _held_by_files_and_classes(modules: Iterable[nn.Module]) -> Iterator[tuple[Callable, Callable]]:
    """How to read and write each place, but for the globals that Patch.everywhere knows."""
    for space in namespaces(modules):
        for name, value in list(space.items()):
            if _is_flex(value) and hasattr(value, _COMPILED):
                yield (
                    functools.partial(operator.getitem, space, name),
                    functools.partial(operator.setitem, space, name),
                )
    for cls in classes(modules):
        for name, value in list(vars(cls).items()):
            static = isinstance(value, staticmethod)
            if _is_flex(value.__func__ if static else value):
                yield functools.partial(getattr, cls, name), functools.partial(_set, cls, name, static)


def _set(cls: type, name: str, static: bool, function: Callable) -> None:
    setattr(cls, name, staticmethod(function) if static else function)


def _door(original: Callable[..., Any], *, compiled: bool) -> Callable[..., Any]:
    @functools.wraps(original)
    def flex_attention(*args: Any, **kwargs: Any) -> Any:
        if transformed():
            return original(*args, **kwargs)
        thread = owners.thread
        if not owners.measuring or thread.suspended or thread.receiver is not None:
            return original(*args, **kwargs)
        owner = owners.running_owner()
        if owner is None or not owner.instrumentation.measuring:
            return original(*args, **kwargs)
        return owner.instrumentation.attend(
            owner.layer,
            functools.partial(_described, compiled, *args, **kwargs),
            functools.partial(original, *args, **kwargs),
        )

    return flex_attention


@torch.no_grad()
def _described(
    compiled: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: _Mod | None = None,
    block_mask: flex.BlockMask | None = None,
    scale: float | None = None,
    *_: Any,
    **__: Any,
) -> AttentionCall:
    """flex_attention's arguments as one call; those that change no score are left out."""
    require_plain(query=query, key=key, value=value)
    if key.shape[0] == 1:  # as paged keys are, which all sequences share
        key, value = (x.expand(query.shape[0], -1, -1, -1) for x in (key, value))
    call = AttentionCall(
        query=query,
        key=key,
        value=value,
        attn_mask=None,
        is_causal=False,
        scale=scale,
        softcap=None,
        sinks=None,
        door=NAME,
        from_output=lambda out: out,
        not_fused=NOT_FUSED,
        prefer_fused=False,
    )
    add_mods(call, score_mod, block_mask, compiled)
    return call


def add_mods(
    call: AttentionCall, score_mod: _Mod | None, block_mask: flex.BlockMask | None, compiled: bool
) -> None:
    """Let `call` be the one with this score_mod and block_mask.

    compiled: whether compiled kernels run it, which skip the blocks that a BlockMask leaves out; the unfused
        implementation asks its mask_mod everywhere. The two differ where the blocks were not made from it.
    """
    if block_mask is not None and len(block_mask.shape) != 4:
        raise Unmeasurable(f"its block_mask has {len(block_mask.shape)} dimensions, not 4")
    visible = None if block_mask is None else _visible(block_mask, compiled)
    shape = () if block_mask is None else (*block_mask.shape[:2], call.query.shape[2], call.key.shape[2])
    if score_mod is None and visible is None:
        return
    if score_mod is None and call.attn_mask is None and torch.Size(shape).numel() <= MASK_ELEMENTS:
        call.attn_mask = _boolean(visible, shape, call.query.device)
    elif call.sinks is not None:
        raise Unmeasurable("its learned sinks come with a block_mask too large to be written out")
    else:
        call.modify = functools.partial(_modify, score_mod, visible)


def _visible(block_mask: flex.BlockMask, compiled: bool) -> _Mod:
    """Where a query sees a key: a mask_mod."""
    if not compiled:
        return block_mask.mask_mod
    partial = _in_blocks(block_mask, block_mask.kv_num_blocks, block_mask.kv_indices)
    visible = flex.and_masks(partial, block_mask.mask_mod)
    if block_mask.full_kv_num_blocks is None:
        return visible
    # In full blocks the kernels do not ask mask_mod.
    full = _in_blocks(block_mask, block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    return flex.or_masks(full, visible)


def _in_blocks(block_mask: flex.BlockMask, count: Tensor, index: Tensor) -> _Mod:
    """Whether a query and a key lie in one of these blocks."""
    height, width = block_mask.BLOCK_SIZE
    only = flex.BlockMask.from_kv_blocks(
        count, index, BLOCK_SIZE=(height, width), seq_lengths=block_mask.seq_lengths, compute_q_blocks=False
    )
    blocks = only.to_dense().bool()  # (B, H, blocks of queries, blocks of keys), 1 where it broadcasts

    def in_block(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        b, h = (index * (size > 1) for index, size in zip((b, h), blocks.shape[:2]))
        return blocks[b, h, i // height, j // width]

    return in_block


def _boolean(visible: _Mod, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The mask, boolean of this shape, (B or 1, H or 1, M, N)."""
    batch, heads, num_queries, num_keys = shape
    mask = torch.empty(shape, dtype=torch.bool, device=device)
    for rows in masks.row_chunks(num_queries, num_keys, batch * heads):

        def below(b: Tensor, h: Tensor, i: Tensor, j: Tensor, start: int = rows.start) -> Tensor:
            return visible(b, h, i + start, j)

        mask[:, :, rows] = flex.create_mask(
            below, batch, heads, rows.stop - rows.start, num_keys, device=device
        )
    return mask


def _modify(
    score_mod: _Mod | None, visible: _Mod | None, scores: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """`AttentionCall.modify` of these two. A score that is made very low is taken for a hidden one."""
    evaluate = functools.partial(flex.create_mask, B=scores.shape[0], H=scores.shape[1], device=scores.device)
    sizes = {"Q_LEN": scores.shape[2], "KV_LEN": scores.shape[3]}
    seen = torch.ones_like(scores, dtype=torch.bool)
    if visible is not None:
        seen &= evaluate(lambda b, h, i, j: visible(b, h, rows[b, h, i], j), **sizes)
    if score_mod is not None:
        plain = scores

        def modified(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score_mod(plain[b, h, i, j], b, h, rows[b, h, i], j)

        scores = evaluate(modified, **sizes).to(scores.dtype)
        seen &= ~(scores < NEVER_A_SCORE)  # NaN is visible
    return scores, seen
