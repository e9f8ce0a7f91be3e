"""Which query rows a sampled measurement takes: the reader's side of `kernels/shared/sampling.py`."""

from __future__ import annotations

from torch import Tensor

from ..kernels.shared.sampling import BLOCK_ROWS, num_rows, row_index

__all__ = ["BLOCK_ROWS", "effective_period", "num_rows", "row_index", "take_rows"]


def effective_period(period: int, num_queries: int) -> int:
    """`period`, or the number of blocks where a sequence has fewer: every phase takes at least one."""
    return max(1, min(period, -(-num_queries // BLOCK_ROWS)))


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """x, (B, H, M) or (B, H, M, C), at the rows of a sample; row 0 stands in where there is none."""
    index = index.clamp(min=0)
    if x.dim() == 4:
        index = index[..., None].expand(*index.shape, x.shape[3])
    return x.gather(2, index)
