"""Which implementation computes a call: the one place that knows cards, versions and what each kernel covers."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .validation import Options

HOPPER, TRITON, REFERENCE = "Hopper kernel", "Triton kernel", "PyTorch reference"

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KERNEL_MAX_HEAD_DIM = 256
# The Hopper forward is written in Gluon, whose interface changes between versions of Triton: it is used
# with the versions that the GPU tests were run on.
HOPPER_TRITON = ("3.6.",)


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
    if not extended and hopper_is_tested(query.device):
        from .kernels import hopper

        if hopper.covers(query, key, value, options):
            return HOPPER
    return TRITON
