"""What kernels return: memory for outputs and row statistics, and the gradients. PyTorch only."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

# An additive mask below it counts as this number. Models hide keys with the least number of a format. Its product with
# log2 e and its square are infinite, and 0 * inf is NaN. Squares of this one can be summed over a million keys.
LEAST_BIAS = -1e16


class Core(NamedTuple):
    """The statistics of every row, in nats."""

    lse: Any
    entropy: Any
    max_logit: Any
    min_logit: Any


class Extended(NamedTuple):
    """The statistics that are computed on request, in the order in which they are stored."""

    logit_var: Any
    collision: Any
    score_std: Any
    sink_mass: Any
    score_mean: Any
    log_denominator: Any
    visible_keys: Any


class Rows(NamedTuple):
    """Where a kernel stores row statistics: fp32 (B, H, M), one row after another."""

    lse: Tensor
    entropy: Tensor
    max_logit: Tensor
    min_logit: Tensor
    more: Tensor | None  # the fields of Extended, (7, B, H, M)
    stride_more: int  # from one field of `more` to the next


class Gradients(NamedTuple):
    """Gradients in the inputs' dtypes; None where there is no such input."""

    query: Tensor
    key: Tensor
    value: Tensor | None
    sinks: Tensor | None
    mask: Tensor | None = None  # the additive mask's, on request


def empty_output(query: Tensor, value_dim: int) -> Tensor:
    """Memory for an output (B, H, M, D_v), with the query's order of dimensions in memory, like SDPA's.

    A model often transposes (B, M, H, D) before attention and back after it. The output then has the same layout,
    and the transposition back costs no copy.
    """
    batch, heads, num_queries, _ = query.shape
    shape = (batch, heads, num_queries, value_dim)
    if query.stride(1) < query.stride(2):
        strides = (num_queries * heads * value_dim, value_dim, heads * value_dim, 1)
        return torch.empty_strided(shape, strides, dtype=query.dtype, device=query.device)
    return query.new_empty(shape)


def new_rows(shape: tuple[int, int, int], device: torch.device, extended: bool, blank: bool) -> Rows:
    """Memory for the statistics of `shape` (B, H, M) rows; blank: filled with those of empty rows."""
    # Four tensors and not four parts of one: an operator's results may not share their storage.
    lse = torch.empty(shape, dtype=torch.float32, device=device)
    more = (
        torch.empty((len(Extended._fields), *shape), dtype=torch.float32, device=device) if extended else None
    )
    core = (lse, torch.empty_like(lse), torch.empty_like(lse), torch.empty_like(lse))
    rows = Rows(*core, more, lse.numel())
    if blank:
        for tensor, number in zip(rows, (-torch.inf, 0.0, -torch.inf, torch.inf, 0.0)):
            if tensor is not None:
                tensor.fill_(number)
    return rows


def sink_gradient(sinks: Tensor, lse: Tensor, offset: Tensor, d_entropy: Tensor | None) -> Tensor:
    """Gradient of the learned sinks (H,).

    A sink is a key without a value, so its dp is 0. lse, offset (delta'') and d_entropy are (B, H, M).
    """
    log_p = sinks.to(lse.dtype)[None, :, None] - lse
    inner = -offset if d_entropy is None else -offset - d_entropy * log_p
    weightless = (lse == -torch.inf) | (log_p == -torch.inf)
    per_row = torch.where(weightless, 0.0, log_p.exp() * inner)
    return per_row.sum((0, 2)).to(sinks.dtype)
