"""Which implementation computes a call, and the call: the one place that knows cards, versions and coverage."""

from __future__ import annotations

import functools
import importlib
import logging
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

from ..reference import attention as reference
from ..statistics.fields import EXTENDED_FIELDS
from ..statistics.rows import RowStats
from . import library
from .call import Options

HOPPER, TRITON, REFERENCE = "Hopper kernel", "Triton kernel", "PyTorch reference"
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KERNEL_MAX_HEAD_DIM = 256
# The Hopper forward is written in Gluon, whose interface changes between versions of Triton: it is used
# with those that the GPU tests were run on.
HOPPER_TRITON = ("3.6.",)
_log = logging.getLogger("hnf_attention")


@functools.cache
def kernel(name: str) -> ModuleType:
    """A module of `kernels`, which import Triton; an import statement would cost each call several microseconds."""
    return importlib.import_module(f"..kernels.{name}", __package__)


def kernels_cover(query: Tensor, value: Tensor | None) -> bool:
    """Whether the portable Triton kernels take these tensors."""
    largest = max(query.shape[3], 0 if value is None else value.shape[3])
    return query.is_cuda and query.dtype in KERNEL_DTYPES and largest <= KERNEL_MAX_HEAD_DIM


@functools.cache
def hopper_is_tested(device: torch.device) -> bool:
    """Whether this is a card and a Triton version that the Hopper forward was tested on."""
    import triton

    tested = triton.__version__.startswith(HOPPER_TRITON)
    return tested and torch.cuda.get_device_capability(device) == (9, 0)


def forward_path(query: Tensor, key: Tensor, value: Tensor | None, options: Options, extended: bool) -> str:
    """HOPPER, TRITON or REFERENCE: what computes the output and the statistics of a validated call."""
    if not kernels_cover(query, value):
        return REFERENCE
    tested = not extended and value is not None and hopper_is_tested(query.device)
    return HOPPER if tested and kernel("hopper.host").covers(query, key, value, options) else TRITON


@functools.cache
def _say_once(path: str, dtype: torch.dtype, head_dim: int, device: str) -> None:
    _log.debug("attention of head dimension %d in %s on %s is computed by: %s", head_dim, dtype, device, path)


def forward(
    query: Tensor, key: Tensor, value: Tensor | None, options: Options, extended: bool
) -> tuple[Tensor | None, ...]:
    """(out, lse, entropy, max_logit, min_logit, more) of a validated call.

    out: None without a value; else `reference.empty_output` filled. more: None, or (6, B, H, M), the
    EXTENDED_FIELDS.
    """
    path = forward_path(query, key, value, options, extended)
    _say_once(path, query.dtype, query.shape[3], query.device.type)
    if path == REFERENCE:
        with no_autocast(query):
            out, rows = reference.attention(query, key, value, options, extended=extended)
        if out is not None:
            out = reference.empty_output(query, value.shape[3]).copy_(out)
        return out, *packed(rows, extended)
    with on_device(query):
        if path == HOPPER:
            return kernel("hopper.host").forward(query, key, value, options)
        if value is None:
            return None, *kernel("portable.probe").probe(query, key, options, extended=extended)[:-1]
        return kernel("portable.forward").forward(query, key, value, options, extended=extended)


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    options: Options,
    out: Tensor,
    lse: Tensor,
    entropy: Tensor,
    d_out: Tensor | None,
    d_lse: Tensor | None,
    d_entropy: Tensor | None,
    *,
    mask_gradient: bool = False,
) -> reference.Gradients:
    """`reference.backward` by the fastest kernel that computes it."""
    d_out = None if value is None else d_out
    cotangents = (out, lse, entropy, d_out, d_lse, d_entropy)
    if not kernels_cover(query, value):
        with no_autocast(query):
            return reference.backward(query, key, value, options, *cotangents, mask_gradient=mask_gradient)
    with on_device(query):
        if d_out is not None and d_lse is None and d_entropy is None:
            kind = library.choose(query, key, value, options)
            if kind is not None:
                return library.backward(kind, query, key, value, options, out, lse, d_out)
        return kernel("portable.backward").backward(
            query, key, value, options, *cotangents, mask_gradient=mask_gradient
        )


def packed(rows: RowStats, extended: bool) -> tuple[Tensor | None, ...]:
    """Row statistics as the kernels return them: four tensors, and the extended ones as a fifth, or None.

    Numbers of keys are exact there up to 2^24 in fp32.
    """
    more = None
    if extended:
        more = torch.stack([getattr(rows, name).to(rows.lse.dtype) for name in EXTENDED_FIELDS])
    return rows.lse, rows.entropy, rows.max_logit, rows.min_logit, more


def on_device(query: Tensor) -> AbstractContextManager:
    """Triton launches on the current device; entering the one that is current already is not free."""
    index = query.device.index
    return _HERE if index == torch.cuda.current_device() else torch.cuda.device(index)


_HERE = nullcontext()


def no_autocast(query: Tensor) -> torch.autocast:
    """The reference chooses its own precision: autocast must not round its products again."""
    return torch.autocast(query.device.type, enabled=False)
