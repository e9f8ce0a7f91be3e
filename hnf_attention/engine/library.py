"""Gradients of attention from PyTorch's own kernels: faster than ours where only the output has a cotangent.

Both take *our* output and natural-log lse in place of what their own forward saved: the backward
recomputes the softmax weights as exp(scores - lse) and needs nothing else.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import compat
from ..reference.attention import Gradients
from .call import Options

CUDNN, FLASH = "cudnn", "flash"
_HALF = (torch.float16, torch.bfloat16)


def choose(query: Tensor, key: Tensor, value: Tensor | None, options: Options) -> str | None:
    """CUDNN or FLASH where that kernel computes this call's gradients, else None.

    None under `torch.use_deterministic_algorithms(True)`: neither promises the same bits every time.
    """
    if value is None or not options.plain or query.dtype not in _HALF or not query.is_cuda:
        return None
    if torch.are_deterministic_algorithms_enabled() or min(query.numel(), key.numel(), value.numel()) == 0:
        return None
    head_dim, value_dim = query.shape[3], value.shape[3]
    if head_dim % 8 or value_dim % 8 or (options.is_causal and query.shape[2] != key.shape[2]):
        return None
    if not all(x.stride(3) == 1 for x in (query, key, value)):
        return None
    kind = _available(query.device)
    if kind == CUDNN and max(head_dim, value_dim) <= 128:
        return CUDNN
    return FLASH if kind and head_dim == value_dim <= 256 else None


@functools.cache
def _available(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    flash = compat.flash_backward is not None and torch.backends.cuda.is_flash_attention_available()
    if not flash or capability < (8, 0):
        return None
    cudnn = compat.cudnn_backward is not None and torch.backends.cudnn.is_available() and capability[0] == 9
    return CUDNN if cudnn else FLASH


def backward(
    kind: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: Options,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
) -> Gradients:
    """`reference.backward` for a cotangent of the output alone; `kind` is what `choose` returned."""
    # An expanded cotangent (of a sum, say) has strides that they do not take.
    d_out = d_out if d_out.is_contiguous() or d_out.stride() == out.stride() else d_out.contiguous()
    num_queries, num_keys = query.shape[2], key.shape[2]
    lengths = num_queries, num_keys, 0.0, options.is_causal
    nothing = _nothing(query.device)
    if kind == CUDNN:
        gradients = compat.cudnn_backward(
            d_out, query, key, value, out, lse[..., None], nothing, nothing, None, None, None, *lengths,
            scale=options.scale,
        )  # fmt: skip
    else:
        gradients = compat.flash_backward(
            d_out, query, key, value, out, lse, None, None, *lengths, nothing, nothing, scale=options.scale
        )
    return Gradients(*gradients, None)


@functools.cache
def _nothing(device: torch.device) -> Tensor:
    """The state of a random generator that is not used."""
    return torch.zeros((), dtype=torch.int64, device=device)
