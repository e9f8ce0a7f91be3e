"""Which query rows a sampled measurement takes: the reader's side of `kernels/shared/sampling.py`."""

from __future__ import annotations

from ..kernels.shared.sampling import BLOCK_ROWS, num_rows, row_index

__all__ = ["BLOCK_ROWS", "effective_period", "num_rows", "row_index"]


def effective_period(period: int, num_queries: int) -> int:
    """`period`, or the number of blocks where a sequence has fewer: every phase takes at least one."""
    return max(1, min(period, -(-num_queries // BLOCK_ROWS)))
