"""How large the scores of each head are: a bound that costs little, and the exact rows of the heads that need them.

A size is the largest range of a row's scores, or the largest score: measure "range" or "max_logit".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.options import Options
from . import api, engines


class Raised(NamedTuple):
    """What calls raise: the largest bound, () fp32, and the size of each head, (H,) fp32; -inf for nothing yet."""

    top: Tensor
    largest: Tensor


def product_options(options: Options) -> Options:
    """The options whose scores are scale * q.k over the visible keys: no bias, no soft-cap, no sink.

    Factors of the weights change this part alone.
    """
    mask = options.attn_mask
    if mask is not None and mask.is_floating_point():
        mask = mask > -torch.inf
    return options._replace(attn_mask=mask, softcap=None, sinks=None)


@torch.no_grad()
def clip_factors(
    query: Tensor,
    key: Tensor,
    options: Options,
    left_out: Tensor | None,
    raised: Raised,
    *,
    measure: str,
    threshold: float,
    exact: bool,
) -> tuple[Tensor, Tensor]:
    """Sizes of a call's heads and the factors that bring them down to the threshold, (H,) fp32 each; raises `raised`.

    A size is an upper bound, `bounds_of_sizes`. exact: for heads whose bound passes the threshold, it is their true
    size. Factors are 1 within the threshold, and for sizes that are not finite.
    query (B, H, M, D), key (B, H_kv, N, D), at least one row each. left_out: boolean (B, M), rows that do not count.
    """
    if engines.kernels_cover(query, None):
        with engines.on_device(query):
            squares = engines.kernel("measure.longest").longest_squares(query, key)
            limit = options.scale, threshold, measure == "range"
            call = engines.kernel("measure.clip").CallSizes(squares, *limit, *raised)
            call.bounds(exact)
            if exact:
                call.rows(query, key, product_options(options), left_out)
        return call.sizes, call.factors
    sizes = bounds_of_sizes(query, key, options.scale, measure)
    torch.maximum(raised.top, sizes.amax(), out=raised.top)
    if exact:
        sizes = sizes_over(sizes, threshold, query, key, options, left_out, measure)
    torch.maximum(raised.largest, sizes, out=raised.largest)
    return sizes, torch.where(sizes.isfinite() & (sizes > threshold), threshold / sizes, 1.0)


@torch.no_grad()
def sizes_of_rows(max_logit: Tensor, min_logit: Tensor, left_out: Tensor | None, measure: str) -> Tensor:
    """(H,) fp32, nats: the largest row of each head; max_logit, min_logit (B, H, M). -inf for heads without rows.

    left_out: boolean, broadcastable to (B, H, M): rows that are not judged.
    """
    sizes = max_logit - min_logit if measure == "range" else max_logit
    if sizes.numel() == 0:
        return torch.full(sizes.shape[1:2], -torch.inf, device=sizes.device)
    if left_out is not None:
        sizes = sizes.masked_fill(left_out, -torch.inf)
    return sizes.float().amax((0, 2))


@torch.no_grad()
def bounds_of_sizes(query: Tensor, key: Tensor, scale: float, measure: str) -> Tensor:
    """(H,) fp32, nats: an upper bound of `sizes_of_rows` of queries (B, H, M, D) and keys (B, H_kv, N, D).

    It comes from the lengths of queries and keys (Cauchy and Schwarz). inf for heads with a NaN or inf.
    """
    longest, longest_keys = _longest(query), _longest(key)
    lengths = longest.view(len(longest_keys), -1) * longest_keys[:, None]
    bounds = lengths.flatten() * (abs(scale) * (2 if measure == "range" else 1))
    return bounds.nan_to_num(torch.inf, torch.inf)


@torch.no_grad()
def sizes_over(
    bounds: Tensor,
    threshold: float,
    query: Tensor,
    key: Tensor,
    options: Options,
    left_out: Tensor | None,
    measure: str,
) -> Tensor:
    """`sizes_of_rows` of the heads whose bound passes the threshold, from all of their scores; the others' bounds.

    bounds: of `bounds_of_sizes`, for the same tensors. left_out: boolean (B, M).
    """
    rows = extreme_scores(query, key, product_options(options))
    skipped = None if left_out is None else left_out[:, None]
    return torch.where(bounds > threshold, sizes_of_rows(*rows, skipped, measure), bounds)


def _longest(x: Tensor) -> Tensor:
    """The length of the longest row of each head, (H,) fp32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=-1, dtype=dtype).amax((0, 2)).float()


def extreme_scores(query: Tensor, key: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """The largest and the smallest score of each row, (B, H, M) fp32. Tensors as for `clip_factors`."""
    if engines.kernels_cover(query, None) and key.shape[2] > 0:
        with engines.on_device(query):
            return engines.kernel("portable.probe").probe(query, key, options)[2:4]
    found = api.attend(query, key, None, options, detached=True)[1]
    return found.max_logit, found.min_logit
