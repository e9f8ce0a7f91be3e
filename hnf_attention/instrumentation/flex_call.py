"""A call of flex_attention as one call of `hnf_attention.attention`.

Functions of (batch, head, query, key) change and hide its scores. PyTorch's own `create_mask` evaluates them at every
place. The keys that a BlockMask leaves visible become a boolean mask of up to MASK_ELEMENTS bytes. A larger mask, and
scores that a score_mod changes, are evaluated chunk by chunk of the rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from ..reference import masks
from .call import AttentionCall, Unmeasurable, require_plain
from .scores import NEVER_A_SCORE

NOT_FUSED = "flex_attention keeps its own output"
MASK_ELEMENTS = 1 << 28

Mod = Callable[..., Tensor]  # of (batch, head, query, key), after a score if it is a score_mod


@torch.no_grad()
def described(
    interceptor: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Mod | None = None,
    block_mask: flex.BlockMask | None = None,
    *,
    compiled: bool,
    scale: float | None = None,
    sinks: Tensor | None = None,
    attn_mask: Tensor | None = None,
    softcap: float | None = None,
) -> AttentionCall:
    """The description of one call. The last three are what transformers' function adds to the scores by itself.

    compiled: whether compiled kernels run the call. They skip the blocks that a BlockMask leaves out; the unfused
        implementation asks its mask_mod everywhere. They differ if the blocks do not follow from mask_mod.
    """
    require_plain(query=query, key=key, value=value)
    if key.shape[0] == 1:  # all sequences share the keys, as with paged keys
        key, value = (x.expand(query.shape[0], -1, -1, -1) for x in (key, value))
    call = AttentionCall(
        query=query,
        key=key,
        value=value,
        attn_mask=attn_mask,
        is_causal=False,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        interceptor=interceptor,
        from_output=lambda out: out,  # never asked for
        not_fused=NOT_FUSED,
        probe_preferred=NOT_FUSED,
        output_of=_output,
    )
    _add_mods(call, score_mod, block_mask, compiled)
    return call


def _output(result: Any) -> Tensor:
    """The output of flex_attention, which may come with its lse."""
    return result[0] if isinstance(result, tuple) else result


def _add_mods(
    call: AttentionCall, score_mod: Mod | None, block_mask: flex.BlockMask | None, compiled: bool
) -> None:
    if block_mask is not None and len(block_mask.shape) != 4:
        raise Unmeasurable(f"its block_mask has {len(block_mask.shape)} dimensions, not 4")
    if block_mask is None:
        if score_mod is not None:
            _modify_scores(call, score_mod, None)
        return
    visible = _visible(block_mask, compiled)
    shape = (*block_mask.shape[:2], call.query.shape[2], call.key.shape[2])
    if score_mod is None and call.attn_mask is None and torch.Size(shape).numel() <= MASK_ELEMENTS:
        call.attn_mask = _boolean(visible, shape, call.query.device)
    else:
        _modify_scores(call, score_mod, visible)


def _modify_scores(call: AttentionCall, score_mod: Mod | None, visible: Mod | None) -> None:
    if call.sinks is not None:
        raise Unmeasurable(
            "its learned sinks come with a function over its scores, or with a block_mask too large to be written out"
        )
    call.modify = functools.partial(_modify, score_mod, visible)


def _visible(block_mask: flex.BlockMask, compiled: bool) -> Mod:
    """A mask_mod that says where a query sees a key."""
    if not compiled:
        return block_mask.mask_mod
    partial = _in_blocks(block_mask, block_mask.kv_num_blocks, block_mask.kv_indices)
    visible = flex.and_masks(partial, block_mask.mask_mod)
    full_count, full_index = block_mask.full_kv_num_blocks, block_mask.full_kv_indices
    if full_count is None or full_index is None:
        return visible
    # In full blocks the kernels do not ask mask_mod.
    return flex.or_masks(_in_blocks(block_mask, full_count, full_index), visible)


def _in_blocks(block_mask: flex.BlockMask, count: Tensor, index: Tensor) -> Mod:
    """A mask_mod that says whether a query and a key lie in one of these blocks."""
    height, width = block_mask.BLOCK_SIZE
    only = flex.BlockMask.from_kv_blocks(
        count, index, BLOCK_SIZE=(height, width), seq_lengths=block_mask.seq_lengths, compute_q_blocks=False
    )
    blocks = only.to_dense().bool()  # (B, H, blocks of queries, blocks of keys), 1 where it broadcasts

    def in_block(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        b, h = (index * (size > 1) for index, size in zip((b, h), blocks.shape[:2]))
        return blocks[b, h, i // height, j // width]

    return in_block


def _boolean(visible: Mod, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The boolean mask of `visible`, of this shape, (B or 1, H or 1, M, N)."""
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
    score_mod: Mod | None, visible: Mod | None, scores: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """`AttentionCall.modify` of these two. A score that is made very low counts as hidden."""
    evaluate: Callable[..., Any] = functools.partial(
        flex.create_mask, B=scores.shape[0], H=scores.shape[1], device=scores.device
    )
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
