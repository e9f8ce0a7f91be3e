"""Gradients of attention from PyTorch's own kernels: faster than ours for a cotangent of the output alone.

Both take *our* output and natural-log lse in place of what their own forward saved: the backward
recomputes the softmax weights as exp(scores - lse) and needs nothing else.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import compat
from ..reference.attention import Gradients
from .call import NOT_PLAIN, BackwardInputs, Call, not_half, too_wide
from .card import NO_CARD, NVIDIA, Card

CUDNN_HEAD_DIM, FLASH_HEAD_DIM = 128, 256  # the largest


def cudnn_supports(call: Call, card: Card) -> str | None:
    """Why cuDNN's backward does not compute the gradients of a call on that card; None if it does."""
    return _cudnn_runs_on(card) or _refused_by_both(call) or too_wide(call.largest_head_dim, CUDNN_HEAD_DIM)


def flash_supports(call: Call, card: Card) -> str | None:
    """Why PyTorch's FlashAttention does not compute the gradients of a call on that card; None if it does."""
    reason = _flash_runs_on(card) or _refused_by_both(call) or too_wide(call.largest_head_dim, FLASH_HEAD_DIM)
    if reason is None and call.value is not None and call.value.shape[3] != call.query.shape[3]:
        return f"q has head dimension {call.query.shape[3]}, v has {call.value.shape[3]}"
    return reason


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
    if card.vendor is None:
        return NO_CARD
    if card.capability < (8, 0):
        return f"needs compute capability 8.0, this card has {card.compute}"
    has_flash = card.has_flash and compat.flash_backward is not None
    return None if has_flash else "this PyTorch has no FlashAttention"


def _refused_by_both(call: Call) -> str | None:
    query, key, value, options, _ = call
    if value is None:
        return "there is no output to differentiate"
    if not options.plain:
        return NOT_PLAIN
    reason = not_half(query.dtype)
    if reason is not None:
        return reason
    if torch.are_deterministic_algorithms_enabled():
        return "torch.use_deterministic_algorithms(True) is set, and its bits may differ between runs"
    if min(query.numel(), key.numel(), value.numel()) == 0:
        return "the call is empty"
    if query.shape[3] % 8 or value.shape[3] % 8:
        return "needs head dimensions that are multiples of 8"
    if options.is_causal and query.shape[2] != key.shape[2]:
        return "needs as many queries as keys under a causal mask"
    if not (query.stride(3) == key.stride(3) == value.stride(3) == 1):
        return "needs q, k and v with an inner stride of 1"
    return None


def cudnn_backward(call: Call, inputs: BackwardInputs, mask_gradient: bool = False) -> Gradients:
    """`reference.backward` for a cotangent of the output alone, by cuDNN's kernel."""
    query, key, value, options, _ = call
    nothing = _nothing(query.device)
    d_query, d_key, d_value = compat.cudnn_backward(
        _cotangent(inputs), query, key, value, inputs.out, inputs.lse[..., None], nothing, nothing,
        None, None, None, query.shape[2], key.shape[2], 0.0, options.is_causal, scale=options.scale,
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


def _cotangent(inputs: BackwardInputs) -> Tensor:
    """The output's cotangent with strides that both kernels take: an expanded one (of a sum) is copied."""
    out, d_out = inputs.out, inputs.d_out
    assert d_out is not None
    return d_out if d_out.is_contiguous() or d_out.stride() == out.stride() else d_out.contiguous()


@functools.cache
def _nothing(device: torch.device) -> Tensor:
    """The state of a random generator that is not used."""
    return torch.zeros((), dtype=torch.int64, device=device)
