"""Merging attention over disjoint key blocks: ring and context-parallel attention, split-KV decoding.

With P_x = exp(lse_x - lse) the share of the softmax that block x holds, of a row with
lse = log sum_x exp(lse_x):
    out = sum_x P_x out_x, entropy = sum_x P_x (H_x - log P_x) (the grouping property of entropy),
    collision = sum_x P_x^2 C_x, logit_var = sum_x P_x (V_x + (E_x - E)^2) (the law of total variance).
The mean score of a block under its softmax is E_x = lse_x - H_x; only differences of it are taken, so
that no two large numbers cancel. `score_std` is Chan's merge of counts, means and variances.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from ..engine.call import check_merge
from .heads import RowStats


class _Shares(NamedTuple):
    """How the softmax of each row is shared out over x = blocks (the sink last): (x, B, H, M)."""

    z: Tensor  # lse_x - max lse; 0 where a block is empty
    log_share: Tensor  # of no use where `share` is 0
    share: Tensor  # 0 for an empty block


def merge_attention(
    parts: Sequence[tuple[Tensor, RowStats]], *, sinks: Tensor | None = None
) -> tuple[Tensor, RowStats]:
    """One attention call's output and statistics from those over disjoint blocks of its keys.

    parts: what `attention(query, key_x, value_x, ...)` returned for each key block x, in any order:
        outputs (B, H, M, D_v) and (B, H, M) statistics. Positions are those inside a block: of
        causal attention, the block at the queries' own positions is causal, earlier ones are not, later
        ones are left out; other masks across blocks are given as `attn_mask`.
    sinks: (H,) learned sinks of the whole call; the parts must be without (see `RowStats.merge`).

    Outputs are combined in the statistics' dtype and returned in the widest of the parts' dtypes: to
    merge one block at a time without rounding in between, make the first output fp32. Differentiable
    in the outputs, `lse`, `entropy` and `sinks`. Raises as `RowStats.merge` does.
    """
    outs = [out for out, _ in parts]
    rows, share = merge_rows([block for _, block in parts], sinks, outs)
    merged = sum(weight[..., None] * out for weight, out in zip(share, outs))  # a sink has no value
    dtype = reduce(torch.promote_types, (out.dtype for out in outs))
    return merged.to(dtype), rows


def merge_rows(
    blocks: Sequence[RowStats], sinks: Tensor | None, outs: Sequence[Tensor] = ()
) -> tuple[RowStats, Tensor]:
    """(`RowStats.merge`, shares (x, B, H, M) by which the outputs combine); `outs` are only checked."""
    check_merge(blocks, outs, sinks)
    lses = [block.lse for block in blocks]
    entropies = [block.entropy for block in blocks]
    empty = torch.stack([lse == -torch.inf for lse in lses]).all(0)
    if sinks is not None:
        # One more block of one element: no entropy or variance within it, all of its mass on it.
        sink = sinks.to(lses[0].dtype)[None, :, None].expand_as(lses[0])
        lses.append(torch.where(empty, -torch.inf, sink))
        entropies.append(torch.zeros_like(lses[0]))
    lse, shares = _share_out(torch.stack(lses))
    entropy = torch.stack(entropies)
    merged = {
        "lse": lse,
        "entropy": _mean(shares.share, entropy - shares.log_share),
        "max_logit": torch.stack([block.max_logit for block in blocks]).amax(0),
        "min_logit": torch.stack([block.min_logit for block in blocks]).amin(0),
    }
    with torch.no_grad():
        merged |= _merge_extended(blocks, shares, entropy.detach())
    return RowStats(**merged, row_index=blocks[0].row_index), shares.share


def _share_out(lse: Tensor) -> tuple[Tensor, _Shares]:
    empty = lse == -torch.inf
    # The shift cancels from every result, so no gradient needs to pass through it.
    shift = lse.detach().amax(0)
    all_empty = shift == -torch.inf
    z = torch.where(empty, 0.0, lse - torch.where(all_empty, 0.0, shift))
    e = torch.where(empty, 0.0, z.exp())
    total = torch.where(all_empty, 1.0, e.sum(0))
    log_total = total.log()
    return shift + log_total, _Shares(z, z - log_total, e / total)


def _mean(share: Tensor, numbers: Tensor) -> Tensor:
    """Mean over blocks; one without mass has no say, whatever its number is."""
    return torch.where(share == 0, 0.0, share * numbers).sum(0)


def _merge_extended(blocks: Sequence[RowStats], shares: _Shares, entropy: Tensor) -> dict[str, Tensor]:
    """The extended fields that all blocks have."""

    def stacked(name: str, of_sink: float) -> Tensor | None:
        values = [getattr(block, name) for block in blocks]
        if any(value is None for value in values):
            return None
        sinks = len(shares.share) - len(blocks)
        return torch.stack(values + [torch.full_like(values[0], of_sink)] * sinks)

    share, merged = shares.share, {}
    if (collision := stacked("collision", 1.0)) is not None:
        merged["collision"] = _mean(share.square(), collision)
    if (variance := stacked("logit_var", 0.0)) is not None:
        mean = shares.z - entropy  # of the block's scores under its softmax, less the largest lse
        merged["logit_var"] = _mean(share, variance + (mean - _mean(share, mean)).square())
    if (count := stacked("visible_keys", 0)) is not None:
        merged["visible_keys"] = count.sum(0)
        mean, std = stacked("score_mean", 0.0), stacked("score_std", 0.0)
        if mean is not None and std is not None:
            weight = count / merged["visible_keys"].clamp(min=1).to(mean.dtype)
            shift = torch.where(count > 0, mean, -torch.inf).amax(0)
            shift = torch.where(merged["visible_keys"] > 0, shift, 0.0)
            mean = mean - shift
            middle = _mean(weight, mean)
            merged["score_mean"] = shift + middle
            merged["score_std"] = _mean(weight, std.square() + (mean - middle).square()).sqrt()
    return merged
