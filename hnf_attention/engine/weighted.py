"""Attention in plain PyTorch that holds the weights: for callers that want them, and for dropout on them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..reference.attention import compute_dtype
from ..reference.masks import visible
from .call import Call


def attend(call: Call, dropout_p: float = 0.0) -> tuple[Tensor, Tensor]:
    """The output (B, H, M, D_v) and the softmax weights (B, H, M, N) of a checked call, in the query's dtype.

    dropout_p: the probability with which each weight is set to 0; those that stay are divided by 1 - dropout_p. The
    weights are returned after dropout, as PyTorch's modules return them. A query without a visible key has weights and
    output 0. Both results are differentiable any number of times. Memory is one number per score.
    Raises ValueError for a call without a value.
    """
    query, key, value, options, _ = call
    if value is None:
        raise ValueError("expected a call with a value for attention weights, got one without")
    group = query.shape[1] // max(1, key.shape[1])
    if group > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    dtype = compute_dtype(query)
    scores = (query * options.scale) @ key.transpose(-2, -1)
    scores = scores.to(dtype)
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    mask = options.attn_mask
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask
    seen = visible(slice(0, query.shape[2]), key.shape[2], options, query.device)
    scores = scores.masked_fill(~seen, -torch.inf)
    sinks = options.sinks
    if sinks is not None:
        sink = sinks.to(dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    else:
        # A row of -inf alone would be NaN, in the gradient too.
        weights = scores.masked_fill(~seen.any(-1, keepdim=True), 0.0).softmax(-1)
    weights = weights.masked_fill(~seen, 0.0).to(query.dtype)
    if dropout_p > 0:
        weights = functional.dropout(weights, dropout_p)
    return weights @ value, weights
