"""How much of a model a diagnosis is about: heads measured, heads judged, and why others were not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ..statistics.fields import JUDGED_MIN_KEYS
from ..statistics.heads import HeadStats


class Extent(NamedTuple):
    """layers, heads: measured. judged: heads with a row that verdicts are about. rows: of all judged heads together.

    left_out: rows of all heads that are padding, or that a query mask leaves out. reasons: why heads were not judged,
    to their number.
    """

    layers: int
    heads: int
    judged: int
    rows: float
    left_out: float
    reasons: dict[str, int]

    def __str__(self) -> str:
        text = f"{counted(self.layers, 'layer')}, {counted(self.heads, 'head')} measured"
        text += f", {self.judged:,} judged over {counted(self.rows, 'row')}"
        if self.left_out:
            text += f" ({counted(self.left_out, 'row')} left out as padding or by a query mask)"
        for reason, number in self.reasons.items():
            text += f"; {counted(number, 'head')} not judged: {reason}"
        return text


def extent(layers: Mapping[str, HeadStats]) -> Extent:
    """Of the latest snapshot's layers."""
    heads = judged = 0
    rows = left_out = 0.0
    reasons: Counter[str] = Counter()
    for stats in layers.values():
        seen = stats.judged_rows
        heads += stats.num_heads
        judged += int((seen > 0).sum())
        rows += seen.sum()
        left_out += stats.left_out_rows.sum()
        for why, chosen in _unjudged(stats, seen == 0).items():
            if chosen.any():
                reasons[why] += int(chosen.sum())
    return Extent(len(layers), heads, judged, rows, left_out, dict(reasons))


def _unjudged(stats: HeadStats, heads: np.ndarray) -> dict[str, np.ndarray]:
    some, bad = stats.rows > 0, stats.nonfinite_rows > 0
    return {
        f"fewer than {JUDGED_MIN_KEYS} keys": heads & some,
        "no finite row": heads & ~some & bad,
        "no row with a visible key": heads & ~some & ~bad,
    }


def counted(number: float, noun: str) -> str:
    """'1 head', '12,345 rows'."""
    return f"{number:,.0f} {noun}{'' if number == 1 else 's'}"
