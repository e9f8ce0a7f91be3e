"""Gradients of attention from PyTorch's own kernels: faster than ours for a cotangent of the output alone.

Both take *our* output and natural-log lse in place of what their own forward saved: the backward
recomputes the softmax weights as exp(scores - lse) and needs nothing else.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import compat
from ..reference.attention import Gradients
from ..reference.options import Options
from .call import NOT_PLAIN, BackwardInputs, Call, not_half, too_wide
from .card import NO_CARD, NVIDIA, Card

CUDNN_HEAD_DIM, FLASH_HEAD_DIM = 128, 256  # the largest
LAUNCH_LIMIT = (
    65535  # blocks of a CUDA grid in its second and third dimension: both kernels put B and H there
)
ALIGNMENT = 16  # bytes: both kernels load as many at once
# cuDNN recomputes a softmax weight as exp(score - lse), also for keys that its last tile has too many. Their score is
# 0, so that an lse below -log(largest fp32) = -88.7 gives infinity, and NaN in dq, dk and dv. The tested version hides
# such keys by the causal mask, and where the number of keys is no multiple of 64 (bench/cudnn_low_lse.py). Of other
# versions nothing is known, but a full tile has no such keys.
CUDNN_TILE, CUDNN_HALF_TILE, CUDNN_TESTED = 128, 64, (9, 19)
LOW_SCORES = "cuDNN's gradient may be NaN for this number of keys, if all scores of a query are below -88"
NO_CUDNN_OPTION = "takes no window, soft-cap, sinks or packed sequences"
# Work of a call, B * H * M * N * D, from which our own backward is faster than FlashAttention's on a Hopper card:
# it takes 0.62 of the time at 1.3e10 and D = 64 and is held up by the host at 3e9 (bench/cudnn_low_lse.py).
OURS_FROM_WORK = 6e9


class Choice(NamedTuple):
    """What the user lets attention take of PyTorch's kernels; `choice` asks for it when a forward runs.

    cudnn, flash: whether that kernel is allowed. deterministic: whether the same bits are asked for in every run.
    """

    cudnn: bool = True
    flash: bool = True
    deterministic: bool = False


def choice() -> Choice:
    """What is in force now, by `torch.nn.attention.sdpa_kernel`, `torch.backends` and deterministic mode."""
    return Choice(
        torch.backends.cuda.cudnn_sdp_enabled() and compat.cudnn_enabled(),
        torch.backends.cuda.flash_sdp_enabled() and compat.other_flash() is None,
        torch.are_deterministic_algorithms_enabled(),
    )


def cudnn_supports(call: Call, card: Card, chosen: Choice) -> str | None:
    """Why cuDNN's backward does not compute the gradients of a call on that card; None if it does."""
    return (
        _cudnn_runs_on(card)
        or (None if chosen.cudnn else "cuDNN's attention is turned off")
        or _shapes_no_cudnn(call.options)
        or _refused_by_both(call, chosen)
        or too_wide(call.largest_head_dim, CUDNN_HEAD_DIM)
        or _beyond_cudnn(call, card)
    )


def flash_supports(call: Call, card: Card, chosen: Choice) -> str | None:
    """Why PyTorch's FlashAttention does not compute the gradients of a call on that card; None if it does."""
    return (
        _flash_runs_on(card)
        or (None if chosen.flash else "PyTorch's FlashAttention is turned off")
        or (None if call.options.plain else NOT_PLAIN)
        or _refused_by_both(call, chosen)
        or too_wide(call.largest_head_dim, FLASH_HEAD_DIM)
        or _beyond_flash(call, card)
    )


@functools.cache
def _cudnn_runs_on(card: Card) -> str | None:
    if card.vendor != NVIDIA:
        return NO_CARD if card.vendor is None else "needs an NVIDIA card"
    if card.capability[0] != 9:
        return f"needs compute capability 9.x, this card has {card.compute}"
    if not card.has_cudnn or compat.cudnn_backward is None:
        return "this PyTorch has no cuDNN"
    return None if card.has_flash else "this PyTorch has no FlashAttention"


@functools.cache
def _flash_runs_on(card: Card) -> str | None:
    if card.vendor != NVIDIA:
        # Of ROCm's kernels in its place nobody has tested that they take our lse.
        return NO_CARD if card.vendor is None else "needs an NVIDIA card"
    if card.capability < (8, 0):
        return f"needs compute capability 8.0, this card has {card.compute}"
    has_flash = card.has_flash and compat.flash_backward is not None
    return None if has_flash else "this PyTorch has no FlashAttention"


def _shapes_no_cudnn(options: Options) -> str | None:
    """What cuDNN's backward does not know of what shapes the scores; None if it knows everything."""
    mask, _, _, window_size, softcap, sinks, seqlens = options
    if not window_size is softcap is sinks is seqlens is None:
        return NO_CUDNN_OPTION
    # One of fp32 is taken and gives NaN. The largest finite numbers of bf16 overflow.
    return None if mask is None or mask.dtype == torch.bool else "takes no additive mask"


def _refused_by_both(call: Call, chosen: Choice) -> str | None:
    query, key, value, options, _ = call
    if value is None:
        return "there is no output to differentiate"
    reason = not_half(query.dtype)
    if reason is not None:
        return reason
    # PyTorch asks for the mode in the backward; a forward under it is taken at its word as well.
    if chosen.deterministic or torch.are_deterministic_algorithms_enabled():
        return "torch.use_deterministic_algorithms(True) is set, and its bits may differ between runs"
    batch, heads, num_queries, head_dim = query.shape
    if min(query.numel(), key.numel(), value.numel()) == 0:
        return "the call is empty"
    if head_dim % 8 or value.shape[3] % 8:
        return "needs head dimensions that are multiples of 8"
    if options.is_causal and num_queries != key.shape[2]:
        return "needs as many queries as keys under a causal mask"
    if max(batch, heads) > LAUNCH_LIMIT:
        return f"takes a batch and heads of at most {LAUNCH_LIMIT}"
    if not (query.stride(3) == key.stride(3) == value.stride(3) == 1):
        return "needs q, k and v with an inner stride of 1"
    if not (_aligned(query) and _aligned(key) and _aligned(value)):
        return f"needs q, k and v whose rows start at multiples of {ALIGNMENT} bytes"
    return None


def _aligned(tensor: Tensor) -> bool:
    """Whether the rows start at multiples of `ALIGNMENT` bytes. The head dimension is a multiple of 8 halves."""
    batch, heads, length, _ = tensor.stride()
    return not (tensor.data_ptr() % ALIGNMENT or (batch | heads | length) % 8)


def _repeated(tensor: Tensor) -> bool:
    """Whether a stride of 0 repeats numbers, as expanding a tensor does."""
    strides = tensor.stride()
    return 0 in strides and any(size > 1 for stride, size in zip(strides, tensor.shape) if stride == 0)


def _beyond_cudnn(call: Call, card: Card) -> str | None:
    """What of a call that PyTorch's kernels take is too much for cuDNN's."""
    query, key, value, options, _ = call
    assert value is not None  # `_refused_by_both` has seen to it
    num_queries, num_keys = query.shape[2], key.shape[2]
    if min(num_queries, num_keys) == 1:
        # One query and one key are refused, and one query of one sequence may be as wrong as `LOW_SCORES` says.
        return "needs more than one query and more than one key"
    if _repeated(query) or _repeated(key) or _repeated(value):
        return "needs q, k and v that no stride of 0 repeats"
    if card.cudnn_version != CUDNN_TESTED:
        if options.attn_mask is not None:
            return f"its masks are tested with cuDNN {'.'.join(map(str, CUDNN_TESTED))} alone"
        return LOW_SCORES if num_queries % CUDNN_TILE or num_keys % CUDNN_TILE else None
    half_full = num_keys % CUDNN_TILE == CUDNN_HALF_TILE
    return LOW_SCORES if half_full and not options.is_causal else None


def _beyond_flash(call: Call, card: Card) -> str | None:
    """What of a call that PyTorch's kernels take is too much for FlashAttention's, or slower with it."""
    query, key, value, _, _ = call
    head_dim = query.shape[3]
    if value is not None and value.shape[3] != head_dim:
        return f"q has head dimension {head_dim}, v has {value.shape[3]}"
    if head_dim > 192 and card.capability not in ((8, 0), (9, 0), (10, 0)):
        # PyTorch's own limit for the gradients on consumer cards (sdp_utils.cpp), whose shared memory is smaller.
        return f"takes head dimensions of at most 192 on a card of compute capability {card.compute}"
    if card.capability == (9, 0) and card.triton is not None and head_dim <= CUDNN_HEAD_DIM:
        work = query.numel() * key.shape[2]
        return "the Triton kernel is faster on this card" if work >= OURS_FROM_WORK else None
    return None


def cudnn_backward(call: Call, inputs: BackwardInputs, mask_gradient: bool = False) -> Gradients:
    """`reference.backward` for a cotangent of the output alone, by cuDNN's kernel."""
    query, key, value, options, _ = call
    nothing = _nothing(query.device)
    bias = None if options.attn_mask is None else _bias(options.attn_mask, query)
    d_query, d_key, d_value = compat.cudnn_backward(
        _cotangent(inputs), query, key, value, inputs.out, inputs.lse[..., None], nothing, nothing,
        bias, None, None, query.shape[2], key.shape[2], 0.0, options.is_causal, scale=options.scale,
    )  # fmt: skip
    return Gradients(d_query, d_key, d_value, None)


def flash_backward(call: Call, inputs: BackwardInputs, mask_gradient: bool = False) -> Gradients:
    """`reference.backward` for a cotangent of the output alone, by FlashAttention's kernel."""
    query, key, value, options, _ = call
    nothing = _nothing(query.device)
    d_query, d_key, d_value = compat.flash_backward(
        _cotangent(inputs), query, key, value, inputs.out, inputs.lse, None, None,
        query.shape[2], key.shape[2], 0.0, options.is_causal, nothing, nothing, scale=options.scale,
    )  # fmt: skip
    return Gradients(d_query, d_key, d_value, None)


def _bias(mask: Tensor, query: Tensor) -> Tensor:
    """A boolean mask as what is added to the scores, in the query's dtype: 0 where a key is visible, else -inf."""
    return torch.where(mask, query.new_zeros(()), query.new_full((), -torch.inf))


def _cotangent(inputs: BackwardInputs) -> Tensor:
    """The output's cotangent as both kernels take it: an expanded one (of a sum) or an unaligned one is copied."""
    out, d_out = inputs.out, inputs.d_out
    assert d_out is not None
    if d_out.is_contiguous() or d_out.stride() == out.stride():
        return (
            d_out if d_out.is_meta or _aligned(d_out) else d_out.clone(memory_format=torch.contiguous_format)
        )
    return d_out.contiguous()


def _nothing(device: torch.device) -> Tensor:
    """The state of a random generator that is not used.

    Made for each call: a tensor that outlives its step must not lie in the memory of a CUDA graph.
    """
    return torch.empty((), dtype=torch.int64, device=device)
