"""Merging attention over disjoint key blocks: ring and context-parallel attention, split-KV decoding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from .checks import check_dense, expected
from .rows import RowStats, check_blocks, merge_rows


def merge_attention(
    parts: Sequence[tuple[Tensor, RowStats]], *, sinks: Tensor | None = None
) -> tuple[Tensor, RowStats]:
    """One attention call's output and statistics from those over disjoint blocks of its keys.

    parts: what `attention(query, key_x, value_x, ...)` returned for each key block x, in any order:
        outputs (B, H, M, D_v) and (B, H, M) statistics. Positions count from the start of a block. In causal
        attention, the block at the queries' own positions is causal, earlier ones are not, and later
        ones are left out. Give other masks across blocks as `attn_mask`.
    sinks: as `RowStats.merge` takes them.

    The output is (B, H, M, D_v), of the widest of the outputs' dtypes. To merge one block at a time without
    rounding in between, make the first output fp32. Differentiable in the outputs, `lse`, `entropy` and
    `sinks`. Raises as `RowStats.merge` does.
    """
    outs, blocks = [out for out, _ in parts], [block for _, block in parts]
    check_blocks(blocks, sinks)
    _check_outputs(outs, blocks[0].lse)
    rows, share = merge_rows(blocks, sinks)
    merged = reduce(torch.add, (weight[..., None] * out for weight, out in zip(share, outs)))
    return merged.to(reduce(torch.promote_types, (out.dtype for out in outs))), rows


def _check_outputs(outs: Sequence[Tensor], rows: Tensor) -> None:
    """Raise ValueError or TypeError for outputs that do not belong to rows (B, H, M)."""
    for out in outs:
        check_dense("outputs", out)
        wanted = (*rows.shape, *outs[0].shape[-1:])
        if out.shape != wanted:
            raise expected(f"outputs of shape {wanted}", tuple(out.shape))
        if out.device != rows.device:
            raise expected(f"outputs on {rows.device}", out.device)
