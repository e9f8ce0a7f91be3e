"""The specification: attention and its row statistics in plain PyTorch.

Everything else in this project is judged against this file. It takes queries in chunks, so memory is
O(chunk x N), and it serves as the CPU path. Half-precision inputs are computed in fp32, fp64 inputs in
fp64. `attention` is differentiable by autograd in `out`, `lse` and `entropy`. `backward` is the same
gradient written out: it recomputes the scores instead of keeping them.

The running state of a row is m (shift), l = sum exp(s - m), w = sum exp(s - m) (s - m). Then
lse = m + log l and entropy = log l - w / l. Entropy is never computed as lse - E[s]: at |s| = 1e4 that
loses seven digits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.shared.results import LEAST_BIAS, Gradients, empty_output, sink_gradient
from ..statistics.fields import EXTENDED_FIELDS
from ..statistics.rows import RowStats
from .masks import mask_rows, row_chunks, take_rows, visible
from .options import Options

__all__ = [
    "Gradients",
    "attention",
    "backward",
    "compute_dtype",
    "empty_output",
    "of_scores",
    "sink_gradient",
    "softmax_offset",
]


class Scores(NamedTuple):
    """Scores of some query rows against all keys, (B, H, rows, N), nats; hidden entries of `scores` are 0."""

    scores: Tensor
    seen: Tensor  # broadcastable bool
    slope: Tensor | None = None  # d score / d (scale * q.k) of the soft-cap
    capped: Tensor | None = None  # (B, H, rows) bool: the soft-cap made a visible inf finite


def compute_dtype(query: Tensor) -> torch.dtype:
    """The dtype that scores and statistics are held in."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _group(x: Tensor, kv_heads: int) -> Tensor:
    """(B, H, rows, C) to (B, H_kv, G * rows, C): grouped-query heads beside each other."""
    batch, heads, rows, width = x.shape
    return x.reshape(batch, kv_heads, heads // max(1, kv_heads) * rows, width)


def score_rows(query: Tensor, key: Tensor, rows: slice | Tensor, options: Options) -> Scores:
    """Scores of some rows: query (B, H, M, D), key (B, H_kv, N, D) in the dtype to compute in.

    rows: a slice, or the row numbers of a sample, int64 (B, H, M_s), of which -1 sees no key.
    """
    num_keys = key.shape[2]
    part = take_rows(query, rows).to(key.dtype)
    seen = visible(rows, num_keys, options, query.device)
    mask = options.attn_mask
    bias = None if mask is None or mask.dtype == torch.bool else mask_rows(mask, rows)
    scores = _group(part, key.shape[1]) @ key.transpose(-1, -2) * options.scale
    scores = scores.reshape(*part.shape[:3], num_keys)
    slope = capped = None
    if options.softcap is not None:
        capped = (scores.isinf() & seen).any(-1)
        tanh = (scores / options.softcap).tanh()
        scores, slope = options.softcap * tanh, 1 - tanh.square()
    if bias is not None:
        scores = scores + bias.to(scores.dtype).clamp(min=LEAST_BIAS)
    return Scores(torch.where(seen, scores, 0.0), seen, slope, capped)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    options: Options,
    *,
    extended: bool = False,
    index: Tensor | None = None,
) -> tuple[Tensor | None, RowStats]:
    """Attention output (B, H, M, D_v), laid out like an `empty_output`, or None without a value; and row statistics.

    index: compute these rows only, int64 (B, H, M_s), -1 for an empty row; M_s then stands for M.
    """
    dtype = compute_dtype(query)
    batch, heads, num_queries, _ = query.shape
    num_queries = num_queries if index is None else index.shape[2]
    out = None if value is None else empty_output(query, value.shape[3])
    key = key.to(dtype)
    value = None if value is None else value.to(dtype)
    chunks = row_chunks(num_queries, key.shape[2], batch * heads)
    parts = [
        _attend_rows(score_rows(query, key, rows, options), value, _sink_rows(options.sinks, rows), extended)
        for rows in (chunk if index is None else index[:, :, chunk] for chunk in chunks)
    ]
    if not parts:
        lse, entropy, high, low = (query.new_zeros(batch, heads, 0, dtype=dtype) for _ in range(4))
        more = query.new_zeros(len(EXTENDED_FIELDS), batch, heads, 0, dtype=dtype) if extended else None
        return out, RowStats.unpack(lse, entropy, high, low, more, index)
    outs, *columns = zip(*parts, strict=True)
    if value is not None:
        # Not written into `out`: transforms of torch.func refuse to write into a tensor that they do not know.
        out = torch.cat(outs, 2).to(query.dtype)
        if query.stride(1) < query.stride(2):
            out = out.transpose(1, 2).contiguous().transpose(1, 2)
    whole = [torch.cat(column, 2) for column in columns]
    lse, entropy, max_logit, min_logit = whole[:4]
    numbers: dict[str, Any] = dict(zip(EXTENDED_FIELDS, whole[4:]))
    return out, RowStats(lse, entropy, max_logit, min_logit, row_index=index, **numbers)


def _sink_rows(sinks: Tensor | None, rows: slice | Tensor) -> Tensor | None:
    """The sinks (H,) of some rows, broadcastable to (B, H, rows); -inf, which is no sink, where there is no row."""
    if sinks is None:
        return None
    of_heads = sinks[None, :, None]
    return of_heads if isinstance(rows, slice) else torch.where(rows >= 0, of_heads, -torch.inf)


def of_scores(scores: Tensor, seen: Tensor) -> tuple[Any, ...]:
    """(lse, entropy, max_logit, min_logit), (B, H, M) each, of scores (B, H, M, N) that are known already.

    seen: boolean, which of them are visible; the others are 0 in `scores`.
    """
    return _attend_rows(Scores(scores, seen), None, None, False)[1:]


def _attend_rows(
    part: Scores, value: Tensor | None, sinks: Tensor | None, extended: bool
) -> tuple[Tensor | None, ...]:
    """(out, the four core statistics, EXTENDED_FIELDS) of some rows. sinks: of `_sink_rows`."""
    scores, seen = part.scores, part.seen
    keyless = ~seen.any(-1).expand(scores.shape[:3])
    if scores.shape[-1] == 0:
        max_logit = scores.new_full(scores.shape[:3], -torch.inf)
        min_logit = -max_logit
    else:
        max_logit = torch.where(seen, scores, -torch.inf).amax(-1)
        min_logit = torch.where(seen, scores, torch.inf).amin(-1)
    # The shift cancels in every result, so no gradient needs to pass through it.
    top, empty = max_logit.detach(), keyless
    if sinks is not None:
        sink = sinks.to(scores.dtype)
        top = torch.maximum(top, sink.detach())
        empty = keyless & (sink.detach() == -torch.inf)  # a sink of -inf is no sink
    shift = torch.where(empty, 0.0, top)
    z = torch.where(seen, scores - shift[..., None], 0.0)
    e = torch.where(seen, z.exp(), 0.0)
    l_i, w_i = e.sum(-1), (e * z).sum(-1)
    if sinks is not None:
        z_sink = sink - shift
        e_sink = z_sink.exp()
        z_sink = torch.where(z_sink == -torch.inf, 0.0, z_sink)  # 0 * -inf must not become NaN
        l_i, w_i = l_i + e_sink, w_i + e_sink * z_sink
    l_safe = torch.where(empty, 1.0, l_i)
    # NaN or inf in q or k always reaches l or w, but not always the maximum.
    broken = (l_i + w_i).isnan() & ~empty
    if part.capped is not None:  # tanh(inf) is 1: the output stays finite, the statistics must show it
        broken = broken | part.capped

    def finish(numbers: Tensor, if_empty: float) -> Tensor:
        return torch.where(broken, torch.nan, torch.where(empty, if_empty, numbers))

    out = None
    if value is not None:
        weights = torch.where(empty[..., None], 0.0, e / l_safe[..., None])
        out = (_group(weights, value.shape[1]) @ value).reshape(*scores.shape[:3], value.shape[-1])
    core = (
        finish(shift + l_safe.log(), -torch.inf),
        finish(l_safe.log() - w_i / l_safe, 0.0),
        finish(max_logit.detach(), -torch.inf),
        finish(min_logit.detach(), torch.inf),
    )
    if not extended:
        return out, *core
    with torch.no_grad():
        mean = (w_i / l_safe)[..., None]
        variance = (e * (z - mean).square()).sum(-1)
        collision = e.square().sum(-1)
        first = (
            seen.expand(scores.shape).to(torch.uint8).argmax(-1, keepdim=True) if scores.shape[-1] else None
        )
        sink_weight = torch.zeros_like(l_i) if first is None else e.gather(-1, first).squeeze(-1)
        if sinks is not None:
            variance = variance + e_sink * (z_sink - mean.squeeze(-1)).square()
            collision = collision + e_sink.square()
            sink_weight = sink_weight + e_sink
        visible_keys = seen.expand(scores.shape).sum(-1)
        count = visible_keys.clamp(min=1)
        # Less the largest score, and not the shift: a sink far above the keys would round them at its own size.
        base = torch.where(keyless, 0.0, max_logit)
        below = z if sinks is None else torch.where(seen, scores - base[..., None], 0.0)
        plain_mean = below.sum(-1) / count
        spread = torch.where(seen, (below - plain_mean[..., None]).square(), 0.0).sum(-1) / count
        more = (
            variance / l_safe,
            collision / l_safe.square(),
            spread.sqrt(),
            sink_weight / l_safe,
            torch.where(keyless, 0.0, base + plain_mean),
            # lse - max_logit without the rounding of either.
            torch.where(keyless, 0.0, shift - max_logit + l_safe.log()),
        )
    return out, *core, *(finish(numbers, 0.0) for numbers in more), visible_keys


def softmax_offset(
    delta: Tensor | None, lse: Tensor, entropy: Tensor, d_lse: Tensor | None, d_entropy: Tensor | None
) -> Tensor:
    """What the softmax gradient subtracts: delta'' = delta - dlse + dentropy * entropy, (B, H, M).

    With log p = s - lse, ds = p * (dp - dentropy * log p - delta''), where delta = rowsum(do * o).
    Written with log p and not with s, so that no two large numbers cancel.
    """
    offset = torch.zeros_like(lse) if delta is None else delta
    if d_lse is not None:
        offset = offset - d_lse
    return offset if d_entropy is None else offset + d_entropy * entropy


def _weights(scores: Tensor, seen: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The logarithms of the softmax weights of some rows, -inf where a key is hidden, and the weights.

    scores, seen: of `score_rows`. lse (B, H, rows, 1). The sum of the weights takes out what the rounding of lse put
    in: from 2^24 on, a lse in fp32 does not know how many keys share the maximum.
    """
    log_p = torch.where(seen, scores - lse, -torch.inf)
    p = log_p.exp()
    total = p.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.where(
            lse == -torch.inf, 0.0, (sinks.to(lse.dtype)[None, :, None, None] - lse).exp()
        )
    total = torch.where(total > 0, total, 1.0)
    return log_p - total.log(), p / total


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    options: Options,
    out: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    d_out: Tensor | None,
    d_lse: Tensor | None,
    d_entropy: Tensor | None,
    *,
    mask_gradient: bool = False,
) -> Gradients:
    """Gradients from the cotangents of out, lse and entropy; memory O(chunk x N).

    out (B, H, M, D_v), lse and entropy (B, H, M): what `attention` returned. A cotangent of None is 0.
    mask_gradient: also that of the additive mask, summed over the dimensions that the mask broadcasts.
    """
    dtype = compute_dtype(query)
    key_c = key.to(dtype)
    value_c = delta = None
    if value is not None and d_out is not None and out is not None:
        value_c = value.to(dtype)
        delta = (d_out.to(dtype) * out.to(dtype)).sum(-1)
    offset = softmax_offset(delta, lse, entropy, d_lse, d_entropy)
    d_query = torch.zeros_like(query, dtype=dtype)
    d_key = torch.zeros_like(key_c)
    d_value = None if value is None else torch.zeros_like(value, dtype=dtype)
    mask = options.attn_mask if mask_gradient else None
    d_mask = None if mask is None else torch.zeros_like(mask, dtype=dtype)
    kv_heads = key.shape[1]
    batch, heads, num_queries, _ = query.shape
    for rows in row_chunks(num_queries, key.shape[2], batch * heads):
        scores, seen, slope, _ = score_rows(query, key_c, rows, options)
        log_p, p = _weights(scores, seen, lse[:, :, rows, None], options.sinks)
        inner = -offset[:, :, rows, None]
        if value_c is not None and d_value is not None and d_out is not None:
            d_rows = _group(d_out[:, :, rows].to(dtype), kv_heads)
            d_value += _group(p, kv_heads).transpose(-1, -2) @ d_rows
            inner = inner + (d_rows @ value_c.transpose(-1, -2)).reshape(p.shape)
        if d_entropy is not None:
            inner = inner - d_entropy[:, :, rows, None] * torch.where(seen, log_p, 0.0)
        d_scores = torch.where(seen, p * inner, 0.0)
        if d_mask is not None:
            part = mask_rows(d_mask, rows)  # a view
            part += d_scores.sum_to_size(part.shape)
        d_scores = d_scores * options.scale
        if slope is not None:
            d_scores = d_scores * slope
        grouped = _group(d_scores, kv_heads)
        d_query[:, :, rows] = (grouped @ key_c).reshape(batch, heads, p.shape[2], key.shape[3])
        d_key += grouped.transpose(-1, -2) @ _group(query[:, :, rows].to(dtype), kv_heads)
    return Gradients(
        d_query.to(query.dtype),
        d_key.to(key.dtype),
        None if d_value is None else d_value.to(query.dtype),
        None if options.sinks is None else sink_gradient(options.sinks, lse, offset, d_entropy),
        None if mask is None or d_mask is None else d_mask.to(mask.dtype),
    )
