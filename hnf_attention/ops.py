"""`attention()` and `attention_stats()`: validate, dispatch, differentiate; fold and measure.

CUDA tensors take the Triton kernels where these cover the call, everything else the reference. Both
stand behind `torch.library` operators with fake kernels and autograd, so that
`torch.compile(fullgraph=True)` sees one opaque node.
"""
# No `from __future__ import annotations` here: torch.library reads the annotations themselves.

from typing import Optional, Tuple  # noqa: UP035 (torch 2.8 infers operator schemas from these only)

import torch
from torch import Tensor

from . import masks, reference, stats, validation
from .stats import RowStats
from .validation import Options

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KERNEL_MAX_HEAD_DIM = 256


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
    extended: also `logit_var`, `collision`, `score_std` and `sink_mass`; not differentiable.

    Returns the output (B, H, M, D_v) in the query's dtype and `RowStats` of (B, H, M) tensors.
    `out`, `lse` and `entropy` are differentiable in query, key, value, sinks, and in an additive mask
    that requires a gradient. `extended`, fp64 and head dimensions above 256 use the chunked PyTorch path
    on every device. Under autocast, inputs are cast as SDPA casts them.
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
) -> RowStats:
    """The row statistics of `attention()` without its output; no value is needed.

    Same arguments, errors and differentiability (`lse` and `entropy`) as `attention`.
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
    return _dispatch(query, key, None, options, extended)[1]


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Floating tensors in the dtype that autocast gives SDPA's inputs; fp64 is left alone, as there."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    wanted = (torch.float16, torch.bfloat16, torch.float32)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in wanted else t for t in tensors)


def _no_autocast(query: Tensor) -> torch.autocast:
    """The reference chooses its own precision: autocast must not round its products again."""
    return torch.autocast(query.device.type, enabled=False)


def _dispatch(
    query: Tensor, key: Tensor, value: Tensor | None, options: Options, extended: bool
) -> tuple[Tensor | None, RowStats]:
    mask = options.attn_mask
    learns_mask = mask is not None and mask.requires_grad and torch.is_grad_enabled()
    if extended or (learns_mask and not _kernels_cover(query, value)):
        with _no_autocast(query):
            return reference.attention(query, key, value, options, extended=extended)
    out, lse, entropy, max_logit, min_logit = _forward_op(
        query,
        key,
        value,
        mask,
        options.sinks,
        options.is_causal,
        options.scale,
        options.window_size,
        options.softcap,
    )
    return out, RowStats(lse, entropy, max_logit, min_logit)


def _kernels_cover(query: Tensor, value: Tensor | None) -> bool:
    largest = max(query.shape[3], 0 if value is None else value.shape[3])
    return query.is_cuda and query.dtype in KERNEL_DTYPES and largest <= KERNEL_MAX_HEAD_DIM


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
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # noqa: UP006
    options = Options(attn_mask, is_causal, scale, window_size, softcap, sinks)
    if _kernels_cover(query, value):
        from .kernels import forward

        with torch.cuda.device(query.device):  # Triton launches on the current device
            return forward.forward(query, key, value, options)
    with _no_autocast(query):
        out, rows = reference.attention(query, key, value, options)
    # An operator returns tensors only: without a value the output is a placeholder without elements.
    out = query.new_empty(0) if out is None else out
    return out, rows.lse, rows.entropy, rows.max_logit, rows.min_logit


@_forward_op.register_fake
def _(query, key, value, attn_mask, sinks, is_causal, scale, window_size, softcap):
    rows = [query.new_empty(query.shape[:3], dtype=reference.compute_dtype(query)) for _ in range(4)]
    shape = (0,) if value is None else (*query.shape[:3], value.shape[3])
    return query.new_empty(shape), *rows


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
    mask_gradient: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # noqa: UP006
    options = Options(attn_mask, is_causal, scale, window_size, softcap, sinks)
    cotangents = (out, lse, entropy, None if value is None else d_out, d_lse, d_entropy)
    if _kernels_cover(query, value):
        from .kernels import backward

        with torch.cuda.device(query.device):
            gradients = backward.backward(
                query, key, value, options, *cotangents, mask_gradient=mask_gradient
            )
    else:  # without the mask's gradient: see _dispatch
        with _no_autocast(query):
            gradients = reference.backward(query, key, value, options, *cotangents)
    return tuple(query.new_empty(0) if g is None else g for g in gradients)


@_backward_op.register_fake
def _(query, key, value, attn_mask, sinks, *more):
    def like(x):
        return query.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)

    return like(query), like(key), like(value), like(sinks), like(attn_mask if more[-1] else None)


def _setup_context(ctx, inputs, output):
    query, key, value, attn_mask, sinks, *ctx.options = inputs
    out, lse, entropy, max_logit, min_logit = output
    ctx.mark_non_differentiable(max_logit, min_logit)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, attn_mask, sinks, out, lse, entropy)


def _backward(ctx, d_out, d_lse, d_entropy, *_):
    query, key, value, attn_mask, sinks, out, lse, entropy = ctx.saved_tensors
    if d_out is None and d_lse is None and d_entropy is None:
        return (None,) * 9
    mask_gradient = ctx.needs_input_grad[3]
    gradients = _backward_op(
        query,
        key,
        value,
        attn_mask,
        sinks,
        *ctx.options,
        out,
        lse,
        entropy,
        d_out,
        d_lse,
        d_entropy,
        mask_gradient,
    )
    d_query, d_key, d_value, d_sinks, d_mask = gradients
    return (
        d_query,
        d_key,
        None if value is None else d_value,
        d_mask if mask_gradient else None,
        None if sinks is None else d_sinks,
        *(None,) * 4,
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
    Frobenius norms over the sequence, largest in the batch. No host synchronisation.
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
    (num_queries, _), num_keys, heads = query.shape[2:], key.shape[2], query.shape[1]
    count, first = masks.visible_keys(
        num_queries,
        num_keys,
        attn_mask=options.attn_mask,
        is_causal=is_causal,
        window_size=window_size,
        device=query.device,
    )
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
    batch, heads, num_queries, head_dim = query.shape
    index = first.expand(batch, heads, num_queries)
    grouped = index.reshape(batch, key.shape[1], -1, 1).expand(-1, -1, -1, head_dim)
    first_key = key.gather(2, grouped).reshape(query.shape)
    scores = (query.to(lse.dtype) * first_key.to(lse.dtype)).sum(-1) * options.scale
    if options.softcap is not None:
        scores = options.softcap * (scores / options.softcap).tanh()
    mask = options.attn_mask
    if mask is not None and mask.dtype != torch.bool:
        full = mask.expand(batch, heads, num_queries, key.shape[2])
        scores = scores + full.gather(-1, index[..., None]).squeeze(-1).to(lse.dtype)
    weight = (scores - lse).exp()
    if options.sinks is not None:
        weight = weight + (options.sinks.to(lse.dtype)[:, None] - lse).exp()
    return torch.where(count > 0, weight, 0.0)
