"""Shares with their intervals, and how well a number ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_Z = 1.96  # of a 95% interval


class Share(NamedTuple):
    """`count` of `total`."""

    count: int
    total: int

    @property
    def value(self) -> float:
        return self.count / self.total if self.total else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval. Source: Wilson, Journal of the American Statistical Association 22 (1927)."""
        if not self.total:
            return float("nan"), float("nan")
        share, n = self.value, self.total
        middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * (share * (1 - share) / n + _Z**2 / (4 * n**2)) ** 0.5
        return max(0.0, middle - half), min(1.0, middle + half)

    def __str__(self) -> str:
        if not self.total:
            return "none"
        low, high = self.interval
        return f"{self.value:.2f} [{low:.2f}, {high:.2f}] ({self.count}/{self.total})"


def share(chosen: Sequence[bool]) -> Share:
    return Share(int(sum(chosen)), len(chosen))


def auroc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """The share of pairs of a positive and a negative that the score puts in order; ties count half. NaN is lowest."""
    values = np.nan_to_num(np.asarray(scores, dtype=np.float64), nan=-np.inf)
    chosen = np.asarray(positive, dtype=bool)
    high, low = values[chosen], np.sort(values[~chosen])
    if not len(high) or not len(low):
        return float("nan")
    below, upto = np.searchsorted(low, high, "left"), np.searchsorted(low, high, "right")
    return float((below + upto).mean() / 2 / len(low))


def median(values: Sequence[float]) -> float:
    return float(np.median(values)) if len(values) else float("nan")
