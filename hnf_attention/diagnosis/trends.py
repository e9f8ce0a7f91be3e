"""How large a head's scores are, and the lines that numbers follow over the snapshots.

Under Adam the query and key weights of an unstable head grow linearly, so its scores grow like t^2.
Lines are therefore fitted to the square root of the size of the scores, not to its logarithm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..statistics.heads import HeadStats
from .thresholds import threshold


def score_size(stats: HeadStats) -> np.ndarray:
    """Half of the largest range of a row, (H,), nats: the largest |score| after the best shift of each row.

    The softmax does not see a number that is added to a whole row. For scores that reach as far up as down the size is
    the largest |score|; otherwise it is smaller. Where a bias is in the scores, it is at most the largest |maximum|.
    """
    half, biased = stats.logit_range_max / 2.0, has_bias(stats)
    return np.where(biased, np.fmin(np.abs(stats.max_logit), half), half) if biased.any() else half


def clip_size(stats: HeadStats) -> np.ndarray:
    """What QK-clip brings to its threshold, (H,), nats: the largest |score|, or the largest range if that is smaller.

    It is the largest |score| where a row holds scores of both signs, and the range where all share a large offset.
    """
    size = np.fmin(stats.max_abs_logit, stats.logit_range_max)
    return np.where(has_bias(stats), np.fmin(np.abs(stats.max_logit), size), size)


def product_size(stats: HeadStats) -> np.ndarray:
    """Largest |scale * q.k|, (H,), nats: what number formats have to hold. A bias in the scores is left out."""
    largest = np.where(has_bias(stats), np.abs(stats.max_logit), stats.max_abs_logit)
    return np.fmin(largest, stats.score_magnitude)


def has_bias(stats: HeadStats) -> np.ndarray:
    """Heads, boolean (H,), whose smallest score is a bias: an ALiBi slope or a number that hides a key.

    Only an additive mask, or scores whose q and k are not known, can hold one.
    """
    kind = stats.score_kind
    if not (kind > 0).any():
        return np.zeros_like(kind, dtype=bool)
    low = stats.min_logit
    possible = (kind > 0) & (low < -threshold("bias_floor"))
    if not possible.any():
        return possible
    with np.errstate(invalid="ignore", over="ignore"):  # the magnitude of unknown q and k
        beyond = ~(-low <= stats.score_magnitude)
    return possible & ((kind == 1) | beyond) & (-low > threshold("bias_ratio") * np.abs(stats.max_logit))


class Trail(NamedTuple):
    """Sizes of the scores at some steps, oldest first: steps (P,), sizes (P, H), nats."""

    steps: np.ndarray
    sizes: np.ndarray


def stale(sizes: np.ndarray) -> np.ndarray:
    """Which sizes lie before the last fall of the scores, of (T, H)."""
    fell = sizes[1:] < threshold("trend_restart") * sizes[:-1]
    old = np.zeros_like(sizes, dtype=bool)
    old[:-1] = np.logical_or.accumulate(fell[::-1], axis=0)[::-1]
    return old


@dataclass(frozen=True)
class Line:
    """A robust line for each head, (H,) each; NaN for a head without one."""

    level: np.ndarray  # at the last snapshot
    slope: np.ndarray  # per step
    span: np.ndarray  # steps that the fitted snapshots cover

    def ahead(self, steps: float | np.ndarray) -> np.ndarray:
        """Value of the line that many steps after the last snapshot."""
        return self.level + self.slope * steps

    def steps_until(self, target: float) -> np.ndarray:
        """Steps from the last snapshot until the line meets `target`; NaN if it moves away from it."""
        distance = target - self.level
        steps = np.divide(distance, self.slope, out=np.full_like(self.level, np.nan), where=self.slope != 0)
        return np.where(steps >= 0, steps, np.nan)


class Forecast(NamedTuple):
    """In how many steps something comes, (H,) each: most likely, and from when to when in four of five cases."""

    steps: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def text(self, head: int) -> str:
        """'in 31 (13 to 130) steps'."""
        return f"in {self.steps[head]:.0f} ({self.low[head]:.0f} to {self.high[head]:.0f}) steps"


def forecast(steps: np.ndarray) -> Forecast:
    """Of the steps in which a line meets a size; growth slows down on the way, and most heads come later."""
    likely = steps + threshold("forecast_delay")
    return Forecast(likely, threshold("forecast_low") * likely, threshold("forecast_high") * likely)


def theil_sen(steps: np.ndarray, values: np.ndarray) -> Line:
    """Theil-Sen lines through steps (T,) and values (T, H): the median of the slopes of all pairs.

    NaN values are left out. A head with fewer than `trend_snapshots_min` values, or values of
    fewer than `trend_span` steps, gets no line.
    Source: Sen, Journal of the American Statistical Association 63 (1968), 1379-1389.
    """
    first, second = np.triu_indices(len(steps), k=1)
    apart = steps[second] > steps[first]
    first, second = first[apart], second[apart]
    known = ~np.isnan(values)
    reach = steps[-1] - steps[known.argmax(0)]
    fitted = (known.sum(0) >= threshold("trend_snapshots_min")) & (reach >= threshold("trend_span"))
    none = np.full(values.shape[1], np.nan)
    if not (fitted.any() and len(first)):
        return Line(none, none, none)
    slopes = (values[second] - values[first]) / (steps[second] - steps[first])[:, None]
    slope = np.where(fitted, _median(slopes), none)
    level = _median(values - slope * (steps - steps[-1])[:, None])
    span = np.where(fitted, reach, none)
    return Line(level, slope, span)


def _median(values: np.ndarray) -> np.ndarray:
    """`np.nanmedian` along the first axis; it takes a tenth of the time for few values."""
    ordered = np.sort(values, axis=0)  # NaN comes last
    count, heads = (~np.isnan(values)).sum(0), np.arange(values.shape[1])
    return (ordered[(count - 1) // 2, heads] + ordered[count // 2, heads]) / 2.0
