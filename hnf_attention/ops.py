"""`attention()` and `attention_stats()`: validate, dispatch, differentiate; fold and measure.

CUDA tensors take the Triton kernels where these cover the call, everything else the reference. Both
stand behind `torch.library` operators with fake kernels and autograd, so that
`torch.compile(fullgraph=True)` sees one opaque node.
"""
# No `from __future__ import annotations` here: torch.library reads the annotations themselves.

from typing import Optional, Tuple  # noqa: UP035 (torch 2.8 infers operator schemas from these only)

import torch
from torch import Tensor

from . import dispatch, masks, reference, sampling, stats, validation
from .stats import RowStats
from .validation import Options


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    extended: bool = False,
) -> tuple[Tensor, RowStats]:
    """Scaled dot-product attention that also returns the exact softmax statistics of every row.

    Arguments and layout are those of `torch.nn.functional.scaled_dot_product_attention`: query
    (B, H, M, D), key (B, H_kv, N, D), value (B, H_kv, N, D_v), all of one dtype on one device.
    H may be a multiple of H_kv (grouped-query attention). Scores are
    `softcap * tanh(scale * q.k / softcap) + attn_mask`, in natural-log units.

    attn_mask: boolean (True = attend) or additive (the query's dtype or fp32; -inf hides a key),
        broadcastable to (B, H, M, N). It combines with `is_causal` and `window_size`.
    is_causal: query i sees keys 0..i (top-left aligned).
    scale: D ** -0.5 when None.
    window_size: only keys with |i - j| < window_size are visible.
    softcap: logit soft-cap (Gemma 2, arXiv 2408.00118, section 2).
    sinks: (H,) learned sink logits, one more softmax element without a value (gpt-oss).
    extended: also `logit_var`, `collision`, `score_std` and `sink_mass`; these are not differentiable.

    Returns the output (B, H, M, D_v) in the query's dtype and `RowStats` of (B, H, M) tensors.
    `out`, `lse` and `entropy` are differentiable in query, key, value, sinks, and in an additive mask
    that requires a gradient (that, fp64 and head dimensions above 256 use the chunked PyTorch path on
    every device). Under autocast, inputs are cast as SDPA casts them.
    Raises ValueError or TypeError (expected, got) before anything runs.
    """
    query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    options = validation.check(
        query,
        key,
        value,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        window_size=window_size,
        softcap=softcap,
        sinks=sinks,
    )
    return _dispatch(query, key, value, options, extended)


def attention_stats(
    query: Tensor,
    key: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    extended: bool = False,
    sample: tuple[int, int] | None = None,
) -> RowStats:
    """The row statistics of `attention()` without its output; no value is needed.

    Same arguments, errors and differentiability (`lse` and `entropy`) as `attention`, and

    sample: (period, phase), ints >= 1 and >= 0: measure blocks of 64 query rows, one of every `period`
        consecutive ones; a sequence with fewer blocks gives one of all of them. Phases that follow each
        other take other blocks, and `period` of them every row (just once, where there are as many
        blocks). Each (batch, head) takes blocks of its own.
        The result is compact, (B, H, M_s) with `row_index` saying which rows, and not differentiable.
    """
    query, key, attn_mask = _autocast(query, key, attn_mask)
    options = validation.check(
        query,
        key,
        None,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        window_size=window_size,
        softcap=softcap,
        sinks=sinks,
    )
    if sample is None:
        return _dispatch(query, key, None, options, extended)[1]
    period, phase = validation.check_sample(sample)
    period = sampling.effective_period(period, query.shape[2])
    with torch.no_grad():
        *core, more, index = _sample_op(query, key, *_flat(options), extended, period, phase % period)
    return _rows(core, more, index)


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Floating tensors in the dtype that autocast gives SDPA's inputs; fp64 is left alone, as there."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    wanted = (torch.float16, torch.bfloat16, torch.float32)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in wanted else t for t in tensors)


def _dispatch(
    query: Tensor, key: Tensor, value: Tensor | None, options: Options, extended: bool
) -> tuple[Tensor | None, RowStats]:
    mask = options.attn_mask
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        with dispatch.no_autocast(query):
            return reference.attention(query, key, value, options, extended=extended)
    out, *core, more = _forward_op(query, key, value, *_flat(options), extended)
    return out, _rows(core, more)


def _flat(options: Options) -> tuple:
    """As the operators take them, which know no dataclass."""
    o = options
    return o.attn_mask, o.sinks, o.is_causal, o.scale, o.window_size, o.softcap


def _rows(core: list[Tensor], more: Tensor, index: Tensor | None = None) -> RowStats:
    return RowStats(*core, *(more.unbind(0) if more.dim() > 1 else (None,) * 4), index)


@torch.library.custom_op("hnf_attention::forward", mutates_args=())
def _forward_op(
    query: Tensor,
    key: Tensor,
    value: Optional[Tensor],  # noqa: UP045
    attn_mask: Optional[Tensor],  # noqa: UP045
    sinks: Optional[Tensor],  # noqa: UP045
    is_causal: bool,
    scale: float,
    window_size: Optional[int],  # noqa: UP045
    softcap: Optional[float],  # noqa: UP045
    extended: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # noqa: UP006
    options = Options(attn_mask, is_causal, scale, window_size, softcap, sinks)
    return dispatch.forward(query, key, value, options, extended)


@_forward_op.register_fake
def _(query, key, value, attn_mask, sinks, is_causal, scale, window_size, softcap, extended):
    shape = (0,) if value is None else (*query.shape[:3], value.shape[3])
    return query.new_empty(shape), *_fake_rows(query, query.shape[2], extended)


def _fake_rows(query: Tensor, num_rows: int, extended: bool) -> list[Tensor]:
    dtype, shape = reference.compute_dtype(query), (*query.shape[:2], num_rows)
    shapes = [shape] * 4 + [(4, *shape) if extended else (0,)]
    return [query.new_empty(shape, dtype=dtype) for shape in shapes]


@torch.library.custom_op("hnf_attention::sample", mutates_args=())
def _sample_op(
    query: Tensor,
    key: Tensor,
    attn_mask: Optional[Tensor],  # noqa: UP045
    sinks: Optional[Tensor],  # noqa: UP045
    is_causal: bool,
    scale: float,
    window_size: Optional[int],  # noqa: UP045
    softcap: Optional[float],  # noqa: UP045
    extended: bool,
    period: int,
    phase: int,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # noqa: UP006
    """`attention_stats` of a sample of rows, and their index; `period` is an effective one."""
    options = Options(attn_mask, is_causal, scale, window_size, softcap, sinks)
    if dispatch.kernels_cover(query, None):
        from .kernels import probe

        with torch.cuda.device(query.device):
            return probe.probe(query, key, options, extended=extended, sample=(period, phase))
    index = sampling.row_index(*query.shape[:3], period, phase, query.device)
    with dispatch.no_autocast(query):
        rows = reference.attention(query, key, None, options, extended=extended, index=index)[1]
    return *dispatch.packed(rows, extended), index


@_sample_op.register_fake
def _(query, key, attn_mask, sinks, is_causal, scale, window_size, softcap, extended, period, phase):
    num_rows = sampling.num_rows(query.shape[2], period)
    index = query.new_empty((*query.shape[:2], num_rows), dtype=torch.int64)
    return *_fake_rows(query, num_rows, extended), index


@torch.library.custom_op("hnf_attention::backward", mutates_args=())
def _backward_op(
    query: Tensor,
    key: Tensor,
    value: Optional[Tensor],  # noqa: UP045
    attn_mask: Optional[Tensor],  # noqa: UP045
    sinks: Optional[Tensor],  # noqa: UP045
    is_causal: bool,
    scale: float,
    window_size: Optional[int],  # noqa: UP045
    softcap: Optional[float],  # noqa: UP045
    out: Tensor,
    lse: Tensor,
    entropy: Tensor,
    d_out: Optional[Tensor],  # noqa: UP045
    d_lse: Optional[Tensor],  # noqa: UP045
    d_entropy: Optional[Tensor],  # noqa: UP045
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:  # noqa: UP006
    options = Options(attn_mask, is_causal, scale, window_size, softcap, sinks)
    gradients = dispatch.backward(query, key, value, options, out, lse, entropy, d_out, d_lse, d_entropy)
    # Contiguous, as the fake kernel says; an operator returns tensors only.
    return tuple(query.new_empty(0) if g is None else g.contiguous() for g in gradients)


@_backward_op.register_fake
def _(query, key, value, attn_mask, sinks, *_):
    def like(x):
        return query.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)

    return like(query), like(key), like(value), like(sinks)


def _setup_context(ctx, inputs, output):
    query, key, value, attn_mask, sinks, *ctx.options, _extended = inputs
    out, lse, entropy, *others = output
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, attn_mask, sinks, out, lse, entropy)


def _backward(ctx, d_out, d_lse, d_entropy, *_):
    query, key, value, attn_mask, sinks, out, lse, entropy = ctx.saved_tensors
    if d_out is None and d_lse is None and d_entropy is None:
        return (None,) * 10
    gradients = _backward_op(
        query, key, value, attn_mask, sinks, *ctx.options, out, lse, entropy, d_out, d_lse, d_entropy
    )
    d_query, d_key, d_value, d_sinks = gradients
    return (
        d_query,
        d_key,
        None if value is None else d_value,
        None,  # a mask that requires a gradient never comes here: see _dispatch
        None if sinks is None else d_sinks,
        *(None,) * 5,
    )


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def fold(
    accumulator: Tensor,
    rows: RowStats,
    visible_keys: Tensor,
    sink_mass: Tensor,
    query_norm: Tensor,
    key_norm: Tensor,
) -> None:
    """`stats.fold_rows`, by one kernel launch on CUDA. No host synchronisation."""
    arguments = (accumulator, rows, visible_keys, sink_mass, query_norm, key_norm)
    if accumulator.is_cuda:
        from .kernels import fold as kernel

        with torch.cuda.device(accumulator.device):
            kernel.fold_rows(*arguments)
    else:
        stats.fold_rows(*arguments)


@torch.no_grad()
def measure(
    query: Tensor,
    key: Tensor,
    rows: RowStats,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a fold needs beside `rows`: (visible_keys, sink_mass, query_norm, key_norm).

    visible_keys: int64, broadcastable to (B, H, M). sink_mass: (B, H, M), weight on the first visible
    key plus the learned sink's, from one dot product per row. query_norm, key_norm: (H,) fp32
    Frobenius norms over the sequence, largest in the batch. M is M_s where `rows` are a sample.
    No host synchronisation.
    """
    query, key, attn_mask = _autocast(query, key, attn_mask)
    keywords = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": scale, "window_size": window_size}
    options = validation.check(query, key, None, **keywords, softcap=softcap, sinks=sinks)
    (num_queries, _), num_keys, heads = query.shape[2:], key.shape[2], query.shape[1]
    count, first = masks.visible_keys(
        num_queries,
        num_keys,
        attn_mask=options.attn_mask,
        is_causal=is_causal,
        window_size=window_size,
        device=query.device,
    )
    index = rows.row_index
    if index is not None:
        count, first = (sampling.take_rows(x.expand(query.shape[:3]), index) for x in (count, first))
        count = torch.where(index >= 0, count, 0)
    sink_mass = _sink_mass(query, key, rows, count, first, options)
    group = max(1, heads // max(1, key.shape[1]))

    def norm(x: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(x, dim=(-2, -1), dtype=torch.float32)
        return norms.amax(0) if x.shape[0] else norms.new_zeros(x.shape[1])

    return count, sink_mass, norm(query), norm(key).repeat_interleave(group)


def _sink_mass(
    query: Tensor, key: Tensor, rows: RowStats, count: Tensor, first: Tensor, options: Options
) -> Tensor:
    lse = rows.lse.detach()
    if lse.numel() == 0 or key.shape[2] == 0:
        return torch.zeros_like(lse)
    first = first.expand(lse.shape)
    grouped = first.reshape(lse.shape[0], key.shape[1], -1, 1).expand(-1, -1, -1, key.shape[3])
    first_key = key.gather(2, grouped).reshape(*lse.shape, key.shape[3])
    mask, row = options.attn_mask, torch.arange(query.shape[2], device=query.device)
    if rows.row_index is not None:
        query, row = sampling.take_rows(query, rows.row_index), rows.row_index.clamp(min=0)
    scores = (query.to(lse.dtype) * first_key.to(lse.dtype)).sum(-1) * options.scale
    if options.softcap is not None:
        scores = options.softcap * (scores / options.softcap).tanh()
    if mask is not None and mask.dtype != torch.bool:
        batch, heads = (torch.arange(n, device=lse.device) for n in lse.shape[:2])
        # One element of each row; row 0 of a mask that broadcasts over them stands for all.
        full = mask.expand(*lse.shape[:2], mask.shape[2], key.shape[2])
        row = row if mask.shape[2] > 1 else torch.zeros_like(row)
        scores = scores + full[batch[:, None, None], heads[:, None], row, first].to(lse.dtype)
    weight = (scores - lse).exp()
    if options.sinks is not None:
        weight = weight + (options.sinks.to(lse.dtype)[:, None] - lse).exp()
    return torch.where(count > 0, weight, 0.0)
