"""Tile shapes by head dimension and dtype: pinned, no autotuning at run time."""

from typing import NamedTuple

import torch
import triton

from .primitives import block_dim


class Tiles(NamedTuple):
    """Queries and keys per tile, warps per program, pipelining depth."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Half precision. Measured on the H200 against cuDNN, see bench/NOTES.md.
_FORWARD_HALF = {
    64: Tiles(128, 128, 8, 3),
    128: Tiles(128, 128, 8, 2),
    256: Tiles(128, 64, 8, 2),
}
# fp32 products run on the plain units; small tiles keep the accumulators in registers.
_FORWARD_FLOAT = {64: Tiles(64, 32, 4, 2), 128: Tiles(64, 32, 8, 2), 256: Tiles(32, 32, 8, 1)}
_BACKWARD_HALF = {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 8, 2), 256: Tiles(32, 64, 8, 1)}
_BACKWARD_FLOAT = {64: Tiles(32, 32, 4, 1), 128: Tiles(32, 32, 8, 1), 256: Tiles(16, 32, 8, 1)}

# Query blocks of this many heads run side by side: their keys and values stay in the L2 cache.
HEAD_GROUP = 8


def _pick(half: dict, full: dict, head_dim: int, value_dim: int, dtype: torch.dtype) -> Tiles:
    table = full if dtype == torch.float32 else half
    width = max(block_dim(head_dim), block_dim(value_dim), 64)
    return table[width]


def forward_tiles(head_dim: int, value_dim: int, dtype: torch.dtype) -> Tiles:
    return _pick(_FORWARD_HALF, _FORWARD_FLOAT, head_dim, value_dim, dtype)


def backward_tiles(head_dim: int, value_dim: int, dtype: torch.dtype) -> Tiles:
    return _pick(_BACKWARD_HALF, _BACKWARD_FLOAT, head_dim, value_dim, dtype)


def grid_1d(num_blocks: int, num_heads: int) -> int:
    """Programs of a launch over (block, batch * head); the kernels order them by `HEAD_GROUP`."""
    return num_blocks * triton.cdiv(num_heads, HEAD_GROUP) * HEAD_GROUP
