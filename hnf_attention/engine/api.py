"""`attention()` and `attention_stats()`: validate, dispatch, differentiate.

CUDA tensors take the Triton kernels where these cover the call, everything else the reference. Both
stand behind `torch.library` operators with fake kernels and autograd, so that
`torch.compile(fullgraph=True)` sees one opaque node.
"""
# No `from __future__ import annotations` here: torch.library reads the annotations themselves.

from typing import Optional, Tuple  # noqa: UP035 (torch 2.8 infers operator schemas from these only)

import torch
from torch import Tensor

from .. import compat
from ..reference import attention as reference
from ..reference import sampling
from ..statistics.fields import EXTENDED_FIELDS
from ..statistics.rows import RowStats
from ..tracing import untraced
from . import engines
from .call import Options, check, check_sample


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
    seqlens: Tensor | None = None,
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
    seqlens: cumulative lengths of packed sequences, (S + 1,) int32 or int64, 0 first and never
        decreasing: FlashAttention's `cu_seqlens`. Sequences lie end to end in a batch of 1 with M = N; a
        query sees keys of its own sequence only, and `is_causal`, `window_size` and `attn_mask` apply
        within it. Sequences may be empty; tokens past the last entry are empty rows. The numbers are
        checked where the tensor is on the CPU and nothing traces the call. On a GPU they are never read
        back: wrong ones give wrong results there, but no access outside the tensors.
    extended: also the other fields of `RowStats`; these are not differentiable.

    Returns the output (B, H, M, D_v) in the query's dtype and `RowStats` of (B, H, M) tensors.
    `out`, `lse` and `entropy` are differentiable in query, key, value, sinks and an additive mask. The
    mask's gradient is summed to its shape; on a GPU that takes memory for one number per score, (B, H, M, N),
    of the mask's dtype, or of fp32 where the mask broadcasts. fp64 and head dimensions above 256 use the
    chunked PyTorch path on every device. Under autocast, inputs are cast as SDPA casts them.
    Raises ValueError or TypeError (expected, got) before anything runs.
    """
    query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    options = check(
        query,
        key,
        value,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        window_size=window_size,
        softcap=softcap,
        sinks=sinks,
        seqlens=seqlens,
    )
    return attend(query, key, value, options, extended=extended)


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
    seqlens: Tensor | None = None,
    extended: bool = False,
    sample: tuple[int, int] | None = None,
) -> RowStats:
    """The row statistics of `attention()` without its output; no value is needed.

    Same arguments, errors and differentiability (`lse` and `entropy`) as `attention`, and

    sample: (period, phase), ints >= 1 and >= 0: measure blocks of 64 query rows, one of every `period`
        consecutive ones; a sequence with fewer blocks gives one of all of them. Phases that follow each
        other take other blocks, and `period` of them every row (just once, where there are as many
        blocks). Each (batch, head) takes blocks of its own. Of packed sequences, blocks are cut from the
        pack as a whole, across their borders.
        The result is compact, (B, H, M_s) with `row_index` saying which rows, and not differentiable.
    """
    query, key, attn_mask = _autocast(query, key, attn_mask)
    options = check(
        query,
        key,
        None,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        window_size=window_size,
        softcap=softcap,
        sinks=sinks,
        seqlens=seqlens,
    )
    if sample is None:
        return attend(query, key, None, options, extended=extended)[1]
    return attend_sample(query, key, options, check_sample(sample), extended=extended)


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Floating tensors in the dtype that autocast gives SDPA's inputs; fp64 is left alone, as there."""
    first = tensors[0] if isinstance(tensors[0], Tensor) else None
    # A tenth of what the question below costs; it does not ask MPS, for one.
    if first is not None and first.is_cuda and not compat.any_autocast():
        return tensors
    device = "cpu" if first is None else first.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    wanted = (torch.float16, torch.bfloat16, torch.float32)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in wanted else t for t in tensors)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    options: Options,
    *,
    extended: bool = False,
    detached: bool = False,
) -> tuple[Tensor | None, RowStats]:
    """`attention` for a call that `check` has accepted, in the dtype it is to be computed in.

    detached: the statistics are outside autograd. Without a value the output is None or has no elements.
    """
    if not untraced(query, key, value):
        out, *rows = _forward_op(query, key, value, *_flat(options), extended)
        rows = _rows(*rows)
        return out, rows.detach() if detached else rows
    differentiable = (query, key, value, options.attn_mask, options.sinks)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in differentiable):
        return _EagerAttention.attach(*differentiable, options, extended, detached)
    out, *rows = engines.forward(query, key, value, options, extended)
    return out, _rows(*rows)


@torch.no_grad()
def attend_sample(
    query: Tensor, key: Tensor, options: Options, sample: tuple[int, int], *, extended: bool = False
) -> RowStats:
    """`attention_stats` of a sample (period, phase) of the rows, for a call as `attend` takes it."""
    period, phase = sample
    period = sampling.effective_period(period, query.shape[2])
    if untraced(query, key):
        return _rows(*_sample_rows(query, key, options, extended, period, phase % period))
    return _rows(*_sample_op(query, key, *_flat(options), extended, period, phase % period))


def _flat(options: Options) -> tuple:
    """As the operators take them, which know no dataclass."""
    o = options
    return o.attn_mask, o.sinks, o.seqlens, o.is_causal, o.scale, o.window_size, o.softcap


def _rows(lse, entropy, max_logit, min_logit, more: Tensor | None, index: Tensor | None = None) -> RowStats:
    core = (lse, entropy, max_logit, min_logit)
    if more is None or more.dim() == 1:
        return RowStats(*core, row_index=index)
    *numbers, visible_keys = more.unbind(0)
    return RowStats(*core, *numbers, visible_keys.long(), index)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Optional[Tensor],  # noqa: UP045
    attn_mask: Optional[Tensor],  # noqa: UP045
    sinks: Optional[Tensor],  # noqa: UP045
    seqlens: Optional[Tensor],  # noqa: UP045
    is_causal: bool,
    scale: float,
    window_size: Optional[int],  # noqa: UP045
    softcap: Optional[float],  # noqa: UP045
    extended: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # noqa: UP006
    options = Options(attn_mask, is_causal, scale, window_size, softcap, sinks, seqlens)
    out, *core, more = engines.forward(query, key, value, options, extended)
    return _placeholder(out, query), *core, _placeholder(more, query)


def _placeholder(x: Tensor | None, query: Tensor) -> Tensor:
    """An operator returns tensors only: what is not there has no elements."""
    return query.new_empty(0) if x is None else x


_forward_op = torch.library.custom_op("hnf_attention::forward", _forward, mutates_args=())


@_forward_op.register_fake
def _(query, key, value, attn_mask, sinks, seqlens, is_causal, scale, window_size, softcap, extended):
    out = None if value is None else reference.empty_output(query, value.shape[3])
    return _placeholder(out, query), *_fake_rows(query, query.shape[2], extended)


def _fake_rows(query: Tensor, num_rows: int, extended: bool) -> list[Tensor]:
    dtype, shape = reference.compute_dtype(query), (*query.shape[:2], num_rows)
    shapes = [shape] * 4 + [(len(EXTENDED_FIELDS), *shape) if extended else (0,)]
    return [query.new_empty(shape, dtype=dtype) for shape in shapes]


def _sample(
    query: Tensor,
    key: Tensor,
    attn_mask: Optional[Tensor],  # noqa: UP045
    sinks: Optional[Tensor],  # noqa: UP045
    seqlens: Optional[Tensor],  # noqa: UP045
    is_causal: bool,
    scale: float,
    window_size: Optional[int],  # noqa: UP045
    softcap: Optional[float],  # noqa: UP045
    extended: bool,
    period: int,
    phase: int,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # noqa: UP006
    options = Options(attn_mask, is_causal, scale, window_size, softcap, sinks, seqlens)
    *core, more, index = _sample_rows(query, key, options, extended, period, phase)
    return *core, _placeholder(more, query), index


def _sample_rows(
    query: Tensor, key: Tensor, options: Options, extended: bool, period: int, phase: int
) -> tuple[Tensor | None, ...]:
    """(lse, entropy, max_logit, min_logit, more, row_index) of a sample; `period` is an effective one."""
    if engines.kernels_cover(query, None):
        with engines.on_device(query):
            return engines.kernel("portable.probe").probe(
                query, key, options, extended=extended, sample=(period, phase)
            )
    index = sampling.row_index(*query.shape[:3], period, phase, query.device)
    with engines.no_autocast(query):
        rows = reference.attention(query, key, None, options, extended=extended, index=index)[1]
    return *engines.packed(rows, extended), index


_sample_op = torch.library.custom_op("hnf_attention::sample", _sample, mutates_args=())


@_sample_op.register_fake
def _(query, key, attn_mask, sinks, seqlens, is_causal, scale, window_size, softcap, extended, period, phase):
    num_rows = sampling.num_rows(query.shape[2], period)
    index = query.new_empty((*query.shape[:2], num_rows), dtype=torch.int64)
    return *_fake_rows(query, num_rows, extended), index


def _gradients(
    query: Tensor,
    key: Tensor,
    value: Optional[Tensor],  # noqa: UP045
    attn_mask: Optional[Tensor],  # noqa: UP045
    sinks: Optional[Tensor],  # noqa: UP045
    seqlens: Optional[Tensor],  # noqa: UP045
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
    *,
    mask_gradient: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # noqa: UP006
    options = Options(attn_mask, is_causal, scale, window_size, softcap, sinks, seqlens)
    cotangents = (out, lse, entropy, d_out, d_lse, d_entropy)
    gradients = engines.backward(query, key, value, options, *cotangents, mask_gradient=mask_gradient)
    # Contiguous, as the fake kernel says.
    return tuple(_placeholder(None if g is None else g.contiguous(), query) for g in gradients)


_gradients_op = torch.library.custom_op("hnf_attention::backward", _gradients, mutates_args=())


@_gradients_op.register_fake
def _(query, key, value, attn_mask, sinks, *_, mask_gradient):
    def like(x):
        contiguous = None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        return _placeholder(contiguous, query)

    return like(query), like(key), like(value), like(sinks), like(attn_mask if mask_gradient else None)


def _setup_context(ctx, inputs, output):
    query, key, value, attn_mask, sinks, seqlens, *ctx.options, _extended = inputs
    out, lse, entropy, *others = output
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, attn_mask, sinks, seqlens, out, lse, entropy)


def _backward(ctx, d_out, d_lse, d_entropy, *_):
    *inputs, out, lse, entropy = ctx.saved_tensors
    _query, _key, value, _mask, sinks, _seqlens = inputs
    if d_out is None and d_lse is None and d_entropy is None:
        return (None,) * 11
    cotangents = (out, lse, entropy, d_out, d_lse, d_entropy)
    learns_mask = ctx.needs_input_grad[3]
    d_query, d_key, d_value, d_sinks, d_mask = _gradients_op(
        *inputs, *ctx.options, *cotangents, mask_gradient=learns_mask
    )
    return (
        d_query,
        d_key,
        None if value is None else d_value,
        d_mask if learns_mask else None,
        None if sinks is None else d_sinks,
        *(None,) * 6,
    )


_forward_op.register_autograd(_backward, setup_context=_setup_context)


class _EagerAttention(torch.autograd.Function):
    """The operators' forward and backward without torch.library between them and autograd.

    Every tensor that passes through autograd costs the host a few microseconds, so only what is
    differentiable does.
    """

    @classmethod
    def attach(cls, query, key, value, attn_mask, sinks, options, extended, detached):
        """(out, rows) of a call of which something requires a gradient."""
        rest = []
        # `apply`, less its own search for the transforms that `untraced` has ruled out.
        apply = super(torch.autograd.Function, cls).apply
        results = apply(query, key, value, attn_mask, sinks, options, extended, detached, rest)
        if detached:
            return results, _rows(*rest)
        out, lse, entropy = results
        return out, _rows(lse, entropy, *rest)

    @staticmethod
    def forward(ctx, query, key, value, attn_mask, sinks, options, extended, detached, rest):
        out, *rows = engines.forward(query, key, value, options, extended)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, attn_mask, sinks, options.seqlens, out, *rows[:2])
        ctx.options = options if options.plain else options._replace(attn_mask=None, sinks=None, seqlens=None)
        rest += rows if detached else rows[2:]
        return out if detached else (out, *rows[:2])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, d_lse=None, d_entropy=None):
        query, key, value, attn_mask, sinks, seqlens, out, lse, entropy = ctx.saved_tensors
        if d_out is None and d_lse is None and d_entropy is None:
            return (None,) * 9
        options = ctx.options
        if not attn_mask is sinks is seqlens is None:
            options = options._replace(attn_mask=attn_mask, sinks=sinks, seqlens=seqlens)
        cotangents = (out, lse, entropy, d_out, d_lse, d_entropy)
        gradients = engines.backward(
            query, key, value, options, *cotangents, mask_gradient=ctx.needs_input_grad[3]
        )
        d_query, d_key, d_value, d_sinks, d_mask = gradients
        return d_query, d_key, d_value, d_mask, d_sinks, *(None,) * 4
