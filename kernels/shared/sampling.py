"""Which query rows a sampled measurement takes: blocks of rows, one from each stratum, rotating. PyTorch only.

Rows are cut into blocks of BLOCK_ROWS, and blocks into strata of `period` blocks. From each stratum every
(batch, head) takes one block: the phase plus a shift of its own, so that heads and sequences look at different
positions. The phases 0 .. period - 1 together take every row exactly once.
"""

import torch
from torch import Tensor

BLOCK_ROWS = 64  # rows of one block: a tile of the probe
# A shift is the fractional part of batch * golden ratio + head * sqrt 2 + stratum * sqrt 3, in 32-bit
# fixed point. Multiples of a quadratic irrational spread evenly, along each of the three (Weyl 1916).
BATCH_STEP, HEAD_STEP, STRATUM_STEP = 0x9E3779B9, 0x6A09E667, 0xBB67AE85


def num_rows(num_queries: int, period: int) -> int:
    """Rows of a sample, M_s: BLOCK_ROWS for each stratum, including places beyond the last row."""
    return -(-num_queries // (BLOCK_ROWS * period)) * BLOCK_ROWS


def row_index(
    batch: int, heads: int, num_queries: int, period: int, phase: int, device: torch.device
) -> Tensor:
    """Rows of a sample, int64 (B, H, M_s), -1 in places beyond the last row.

    period: at most the number of blocks. This is the specification of `sampled_block` in the probe.
    """
    b, h = torch.arange(batch, device=device)[:, None, None], torch.arange(heads, device=device)[:, None]
    place = torch.arange(num_rows(num_queries, period), device=device)
    stratum = place // BLOCK_ROWS
    fraction = ((b * BATCH_STEP + h * HEAD_STEP + stratum * STRATUM_STEP) & 0xFFFFFFFF) >> 16
    block = stratum * period + (phase + (fraction * period >> 16)) % period
    rows = block * BLOCK_ROWS + place % BLOCK_ROWS
    return torch.where(rows < num_queries, rows, -1)
