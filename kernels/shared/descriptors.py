"""Tensors as kernels take them: as descriptors for the bulk-copy engine, or as a pointer and strides."""

from typing import Any, NamedTuple

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from .tiles import Pointers, block_dim, ceil_div, pointers


class Strided(NamedTuple):
    """A pointer and strides, or None and zeros."""

    ptr: Any
    stride_b: int
    stride_h: int
    stride_m: int
    stride_d: int


def strided(x: torch.Tensor | None) -> Strided:
    """x (B, H, L, D) for loads and stores of single elements."""
    return Strided(None, 0, 0, 0, 0) if x is None else Strided(x, *x.stride())


def describe(x: torch.Tensor, rows: int, width: int | None = None, kind: type = TensorDescriptor):
    """A `kind` that loads (rows, width or block_dim(D)) of one (batch, head) of x (B, H, L, D).

    Reads beyond L and D give zeros. A tensor that is not `aligned` is copied. A Gluon kernel's `kind` has
    a layout besides, which is for the caller to set.
    """
    align = 16 // x.element_size()
    batch, head, row, inner = strides = x.stride()
    if inner != 1 or (batch | head | row) % align or min(batch, head, row) <= 0 or x.data_ptr() % 16:
        x = aligned(x)
        # The stride of a dimension of size 1 is arbitrary; give it one that the engine accepts.
        outer = (align if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()))
        strides = (*outer, 1)
    # Its own constructor would check all this again, at more than the rest of the call costs the host.
    described = kind.__new__(kind)
    described.base, described.shape, described.strides = x, list(x.shape), list(strides)
    described.block_shape = [1, 1, rows, width or block_dim(x.shape[3])]
    return described


def source(x: torch.Tensor, rows: int, by_pointers: bool) -> TensorDescriptor | Pointers:
    """What `tiles.load_tile` loads (rows, block_dim(D)) of x (B, H, L, D) from."""
    return pointers(x) if by_pointers else describe(x, rows)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x (B, H, L, D) as the bulk-copy engine wants it, or a copy padded with zeros along D.

    It wants unit inner stride and 16-byte aligned outer strides and base.
    """
    align = 16 // x.element_size()
    shape = list(x.shape)
    *outer, inner = x.stride()
    fits = all(size == 1 or (stride > 0 and stride % align == 0) for size, stride in zip(shape, outer))
    if inner == 1 and fits and x.data_ptr() % 16 == 0:
        return x
    padded = x.new_zeros(*shape[:3], ceil_div(shape[3], align) * align)
    padded[..., : shape[3]] = x
    return padded


def describe_rows(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """A descriptor that loads `rows` numbers of one (batch, head) of x (B, H, M), stored one after another.

    Reads beyond M give zeros. The stride of a head must be a multiple of 16 bytes.
    """
    return TensorDescriptor(x, [x.shape[0] * x.shape[1], x.shape[2]], [x.stride(1), 1], [1, rows])
