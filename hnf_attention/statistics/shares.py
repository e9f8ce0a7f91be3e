"""How disjoint blocks of keys share the softmax of their rows.

With P_x = exp(lse_x - lse) the share of block x, in a row with lse = log sum_x exp(lse_x):
    out = sum_x P_x out_x, entropy = sum_x P_x (H_x - log P_x) (the grouping property of entropy),
    collision = sum_x P_x^2 C_x, logit_var = sum_x P_x (V_x + (E_x - E)^2) (the law of total variance).
The mean score of a block under its softmax is E_x = lse_x - H_x. Only differences of it are taken, so that
no two large numbers cancel. `score_std` is Chan's merge of counts, means and variances.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Shares(NamedTuple):
    """How the softmax of each row is shared out over x = blocks (a sink last); each tensor is (x, B, H, M)."""

    z: Tensor  # lse_x - max lse, nats; 0 where a block is empty
    log_share: Tensor  # meaningless where `share` is 0
    share: Tensor  # 0 where a block is empty


class Masses(NamedTuple):
    """lse = top + excess of blocks, (x, B, H, M) each, nats; top is -inf where a block is empty.

    Where both are known, their sum is never taken: in fp32, a large top leaves nothing of the excess.
    """

    lse: Tensor  # what gradients pass through
    top: Tensor
    excess: Tensor


def share_out(masses: Masses) -> tuple[Tensor, Tensor, Shares]:
    """The lse (B, H, M) of all blocks together, also less their largest top, and their shares."""
    empty = masses.top == -torch.inf
    # The shifts cancel from every result, so no gradient needs to pass through them.
    top = masses.top.amax(0)
    all_empty = top == -torch.inf
    known = masses.top - torch.where(all_empty, 0.0, top) + masses.excess
    shift = torch.where(all_empty, 0.0, torch.where(empty, -torch.inf, known).amax(0))
    # The difference of lse is 0: it leads the gradient to lse.
    z = torch.where(empty, 0.0, known - shift + (masses.lse - masses.lse.detach()))
    e = torch.where(empty, 0.0, z.exp())
    total = torch.where(all_empty, 1.0, e.sum(0))
    log_total = total.log()
    excess = shift + log_total
    return top + excess, excess, Shares(z, z - log_total, e / total)


def mean(share: Tensor, numbers: Tensor) -> Tensor:
    """Mean of `numbers` over the blocks; the number of a block with a share of 0 is ignored, even NaN."""
    return torch.where(share == 0, 0.0, share * numbers).sum(0)


def merge_entropy(entropy: Tensor, shares: Shares) -> Tensor:
    """Entropy (B, H, M) of the whole row, nats, from those of its blocks (x, B, H, M)."""
    return mean(shares.share, entropy - shares.log_share)


def merge_extended(
    stacked: Callable[[str, float], Tensor | None], shares: Shares, entropy: Tensor
) -> dict[str, Tensor]:
    """The extended fields that every block has, by name.

    stacked: (name, number of a sink) to that field of all blocks and the sink, (x, B, H, M), or None where a
        block lacks it. entropy: of the blocks, (x, B, H, M).
    """
    share, merged = shares.share, {}
    if (collision := stacked("collision", 1.0)) is not None:
        merged["collision"] = mean(share.square(), collision)
    if (variance := stacked("logit_var", 0.0)) is not None:
        score = shares.z - entropy  # mean score of a block under its softmax, less the largest lse
        merged["logit_var"] = mean(share, variance + (score - mean(share, score)).square())
    if (count := stacked("visible_keys", 0)) is not None:
        merged["visible_keys"] = count.sum(0)
        middle, std = stacked("score_mean", 0.0), stacked("score_std", 0.0)
        if middle is not None and std is not None:
            merged["score_mean"], merged["score_std"] = _merge_moments(count, middle, std)
    return merged


def _merge_moments(count: Tensor, middle: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over all keys, from the counts, means and deviations of the blocks."""
    total = count.sum(0)
    weight = count / total.clamp(min=1).to(middle.dtype)
    shift = torch.where(count > 0, middle, -torch.inf).amax(0)
    shift = torch.where(total > 0, shift, 0.0)
    offset = middle - shift
    whole = mean(weight, offset)
    return shift + whole, mean(weight, std.square() + (offset - whole).square()).sqrt()
