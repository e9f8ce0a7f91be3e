"""`attention()` and `attention_stats()`: validate, dispatch, differentiate.

CUDA tensors take the Triton kernels where these cover the call, everything else the reference. Both
stand behind `torch.library` operators with fake kernels and autograd, so that
`torch.compile(fullgraph=True)` sees one opaque node.
"""
# No `from __future__ import annotations` here: torch.library reads the annotations themselves.

from contextlib import AbstractContextManager, nullcontext
from typing import Optional, Tuple  # noqa: UP035 (torch 2.8 infers operator schemas from these only)

import torch
from torch import Tensor

from . import reference, validation
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
    that requires a gradient (that, `extended`, fp64 and head dimensions above 256 use the chunked
    PyTorch path on every device). Under autocast, inputs are cast as SDPA casts them.
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
    return dispatch(query, key, value, options, extended=extended)


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
    return dispatch(query, key, None, options, extended=extended)[1]


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


def dispatch(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    options: Options,
    *,
    extended: bool = False,
    detached: bool = False,
) -> tuple[Tensor | None, RowStats]:
    """`attention` for a call that `validation.check` has accepted, in the dtype it is to be computed in.

    detached: the statistics are outside autograd. Without a value the output is None or has no elements.
    """
    mask, sinks = options.attn_mask, options.sinks
    grad = torch.is_grad_enabled()
    if extended or (grad and mask is not None and mask.requires_grad):
        with _no_autocast(query):
            out, rows = reference.attention(query, key, value, options, extended=extended)
        return out, rows.detach() if detached else rows
    tensors = (query, key, value, mask, sinks)
    numbers = (options.is_causal, options.scale, options.window_size, options.softcap)
    if not _eager(query, key, value):
        out, *rows = _forward_op(*tensors, *numbers)
        return out, RowStats(*rows).detach() if detached else RowStats(*rows)
    if grad and any(x is not None and x.requires_grad for x in (query, key, value, sinks)):
        out, *rows = _EagerAttention.attach(*tensors, numbers, detached)
    else:
        out, *rows = _forward(*tensors, *numbers)
    return out, RowStats(*rows)


def _eager(*tensors: Tensor | None) -> bool:
    """Whether nothing but autograd watches this call, so that it need not pass through torch.library.

    The operators cost some 50 microseconds of the host's time a call; they are there for what traces,
    transforms or intercepts the call.
    """
    if torch.compiler.is_compiling():
        return False
    watched = (
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )
    return not watched and all(type(x) in _PLAIN_TYPES for x in tensors)


_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter, torch.nn.Buffer, type(None)})


def _kernels_cover(query: Tensor, value: Tensor | None) -> bool:
    largest = max(query.shape[3], 0 if value is None else value.shape[3])
    return query.is_cuda and query.dtype in KERNEL_DTYPES and largest <= KERNEL_MAX_HEAD_DIM


def _on_device(query: Tensor) -> AbstractContextManager:
    """Triton launches on the current device; entering the one that is current already is not free."""
    index = query.device.index
    return _HERE if index == torch.cuda.current_device() else torch.cuda.device(index)


_HERE = nullcontext()


def _forward(
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

        with _on_device(query):
            return forward.forward(query, key, value, options)
    with _no_autocast(query):
        out, rows = reference.attention(query, key, value, options)
    # An operator returns tensors only: without a value the output is a placeholder without elements.
    out = query.new_empty(0) if out is None else out
    return out, rows.lse, rows.entropy, rows.max_logit, rows.min_logit


_forward_op = torch.library.custom_op("hnf_attention::forward", _forward, mutates_args=())


@_forward_op.register_fake
def _(query, key, value, attn_mask, sinks, is_causal, scale, window_size, softcap):
    rows = [query.new_empty(query.shape[:3], dtype=reference.compute_dtype(query)) for _ in range(4)]
    shape = (0,) if value is None else (*query.shape[:3], value.shape[3])
    return query.new_empty(shape), *rows


def _gradients(
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
    cotangents = (out, lse, entropy, None if value is None else d_out, d_lse, d_entropy)
    if _kernels_cover(query, value):
        from .kernels import backward

        with _on_device(query):
            gradients = backward.backward(query, key, value, options, *cotangents)
    else:
        with _no_autocast(query):
            gradients = reference.backward(query, key, value, options, *cotangents)
    return tuple(query.new_empty(0) if g is None else g for g in gradients)


_gradients_op = torch.library.custom_op("hnf_attention::backward", _gradients, mutates_args=())


@_gradients_op.register_fake
def _(query, key, value, attn_mask, sinks, *_):
    def like(x):
        return query.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)

    return like(query), like(key), like(value), like(sinks)


def _setup_context(ctx, inputs, output, detached=False):
    query, key, value, attn_mask, sinks, *ctx.options = inputs
    out, lse, entropy, *extremes = output
    ctx.mark_non_differentiable(*(output[1:] if detached else extremes))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, attn_mask, sinks, out, lse, entropy)


def _backward(ctx, d_out, d_lse, d_entropy, *_, gradients=_gradients_op):
    query, key, value, attn_mask, sinks, out, lse, entropy = ctx.saved_tensors
    if d_out is None and d_lse is None and d_entropy is None:
        return (None,) * 9
    d_query, d_key, d_value, d_sinks = gradients(
        query, key, value, attn_mask, sinks, *ctx.options, out, lse, entropy, d_out, d_lse, d_entropy
    )
    return (
        d_query,
        d_key,
        None if value is None else d_value,
        None,  # a mask that requires a gradient never comes here: see dispatch
        None if sinks is None else d_sinks,
        *(None,) * 4,
    )


_forward_op.register_autograd(_backward, setup_context=_setup_context)


class _EagerAttention(torch.autograd.Function):
    """The operators' forward and backward without torch.library between them and autograd."""

    @classmethod
    def attach(cls, *inputs):
        """`apply`, less its own search for the transforms that `_eager` has ruled out."""
        return super(torch.autograd.Function, cls).apply(*inputs)

    @staticmethod
    def forward(ctx, query, key, value, attn_mask, sinks, numbers, detached):
        inputs = (query, key, value, attn_mask, sinks, *numbers)
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output, detached)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *cotangents):
        return *_backward(ctx, *cotangents, gradients=_gradients)[:5], None, None
