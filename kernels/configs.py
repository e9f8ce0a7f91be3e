"""Tile shapes by head dimension, dtype and causality: pinned, no autotuning at run time."""

from typing import NamedTuple

import torch

from .primitives import block_dim, ceil_div


class Tiles(NamedTuple):
    """Queries and keys per tile, warps per program, pipelining depth."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Half precision, by (tile width, causal). The winners of bench/tune_forward.py on the H200: under a
# causal mask small query blocks waste less of the diagonal; without one, more keys (D = 64) or more
# queries (D = 128) per step hide the latency of the exponentials better.
_FORWARD_HALF = {
    (64, True): Tiles(64, 64, 4, 2),
    (64, False): Tiles(64, 128, 4, 2),
    (128, True): Tiles(64, 64, 4, 3),
    (128, False): Tiles(128, 64, 4, 2),
    (256, True): Tiles(128, 64, 8, 2),
    (256, False): Tiles(128, 64, 8, 2),
}
# fp32 products run on the plain units; small tiles keep the accumulators in registers.
_FORWARD_FLOAT = {64: Tiles(64, 32, 4, 2), 128: Tiles(64, 32, 8, 2), 256: Tiles(32, 32, 8, 1)}
# The backward is correct first; these fit the registers.
_BACKWARD_HALF = {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 8, 2), 256: Tiles(32, 64, 8, 1)}
_BACKWARD_FLOAT = {64: Tiles(32, 32, 4, 1), 128: Tiles(32, 32, 8, 1), 256: Tiles(16, 32, 8, 1)}

# Query blocks of this many heads run side by side: their keys and values stay in the L2 cache.
HEAD_GROUP = 8


def _width(head_dim: int, value_dim: int) -> int:
    return max(block_dim(head_dim), block_dim(value_dim), 64)


def forward_tiles(head_dim: int, value_dim: int, dtype: torch.dtype, is_causal: bool) -> Tiles:
    width = _width(head_dim, value_dim)
    return _FORWARD_FLOAT[width] if dtype == torch.float32 else _FORWARD_HALF[width, is_causal]


def backward_tiles(head_dim: int, value_dim: int, dtype: torch.dtype) -> Tiles:
    table = _BACKWARD_FLOAT if dtype == torch.float32 else _BACKWARD_HALF
    return table[_width(head_dim, value_dim)]


def grid_1d(num_blocks: int, num_heads: int) -> int:
    """Programs of a launch over (block, batch * head); the kernels order them by `HEAD_GROUP`."""
    return num_blocks * ceil_div(num_heads, HEAD_GROUP) * HEAD_GROUP
