"""What a head's numbers do over the readings: how large its scores are, where they go, how soon.

Under Adam the query and key weights of an unstable head grow linearly, so its scores grow like t^2:
lines are fitted to the square root of the largest |score|, never to its logarithm.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..stats import HeadStats, Snapshot
from .thresholds import threshold


def score_size(stats: HeadStats) -> np.ndarray:
    """Largest |score| per head, (H,), nats; of the maxima alone where the minimum is a bias.

    ALiBi slopes and the large negative numbers some models add to hide keys are scores too, but say
    nothing about growth.
    """
    high, low = np.abs(stats.max_logit), stats.min_logit
    bias = (low < -threshold("bias_floor")) & (-low > threshold("bias_ratio") * high)
    return np.where(bias, high, stats.max_abs_logit)


def series(
    history: Sequence[Snapshot], layer: str, readings: int
) -> tuple[np.ndarray, HeadStats, tuple[int, int]]:
    """The layer's last `readings` appearances, oldest first: their steps (T,), all their heads, (T, H).

    The heads of all readings stand side by side as T * H of one, so that a number is computed once for all.
    Readings without the layer are skipped; a change of its head count ends the series.
    """
    found: list[tuple[int, HeadStats]] = []
    for snapshot in reversed(history):
        stats = snapshot.layers.get(layer)
        if stats is None:
            continue
        if len(found) == readings or (found and stats.num_heads != found[0][1].num_heads):
            break
        found.append((snapshot.step, stats))
    steps = np.array([step for step, _ in found[::-1]], dtype=np.float64)
    latest = found[0][1]
    values = np.concatenate([stats.values for _, stats in found[::-1]], axis=1)
    return steps, replace(latest, values=values), (len(found), latest.num_heads)


@dataclass(frozen=True)
class Line:
    """A robust line per head, (H,) each, NaN without one: `level` at the last reading, `slope` per step."""

    level: np.ndarray
    slope: np.ndarray
    span: np.ndarray  # steps that the fitted readings cover

    def of(self, heads: slice) -> Line:
        return Line(self.level[heads], self.slope[heads], self.span[heads])

    def ahead(self, steps: float) -> np.ndarray:
        """Value of the line that many steps after the last reading."""
        return self.level + self.slope * steps

    def steps_until(self, target: float) -> np.ndarray:
        """Steps from the last reading until the line meets `target`; NaN if it moves away from it."""
        distance = target - self.level
        steps = np.divide(distance, self.slope, out=np.full_like(self.level, np.nan), where=self.slope != 0)
        return np.where(steps >= 0, steps, np.nan)


def _median(values: np.ndarray) -> np.ndarray:
    """`np.nanmedian` along the first axis, a tenth of its time where there are few values."""
    ordered = np.sort(values, axis=0)  # NaN comes last
    count = (~np.isnan(values)).sum(0)
    middle = np.stack([(count - 1) // 2, count // 2])
    return np.take_along_axis(ordered, middle, 0).mean(0)


def theil_sen(steps: np.ndarray, values: np.ndarray) -> Line:
    """Theil-Sen lines (median of pairwise slopes) through (T,), (T, H); NaN values are left out.

    A head with fewer than `trend_readings_min` values gets no line.
    """
    heads = values.shape[1]
    level, slope, span = (np.full(heads, np.nan) for _ in range(3))
    first, second = np.triu_indices(len(steps), k=1)
    apart = steps[second] > steps[first]
    first, second = first[apart], second[apart]
    known = ~np.isnan(values)
    fitted = known.sum(0) >= threshold("trend_readings_min")
    if fitted.any() and len(first):
        chosen = values[:, fitted]
        slopes = (chosen[second] - chosen[first]) / (steps[second] - steps[first])[:, None]
        slope[fitted] = _median(slopes)
        level[fitted] = _median(chosen - slope[fitted] * (steps - steps[-1])[:, None])
        span[fitted] = steps[-1] - steps[known[:, fitted].argmax(0)]
    return Line(level, slope, span)


@dataclass(frozen=True)
class Trend:
    """Where one layer's heads are and go: lines of sqrt(largest |score|) and of the entropy ratio."""

    score: np.ndarray  # `score_size` of the latest reading
    root_score: Line
    entropy_ratio: Line

    def score_ahead(self, steps: float | np.ndarray) -> np.ndarray:
        """Projected largest |score|, (H,), nats."""
        return np.maximum(self.root_score.ahead(steps), 0.0) ** 2

    def steps_until_score(self, score: float) -> np.ndarray:
        return self.root_score.steps_until(score**0.5)

    @cached_property
    def rising(self) -> np.ndarray:
        """Heads whose scores clearly grew within the window: boolean, (H,)."""
        line = self.root_score
        return line.slope * line.span > threshold("rising_share") * np.abs(line.level)


def trends(history: Sequence[Snapshot], layers: Iterable[str]) -> dict[str, Trend]:
    """Both lines of each layer over the last readings, since the head's scores last fell at once (a fix, a restart).

    Layers that were read at the same steps are fitted together: one call of many heads costs what one of few does.
    """
    together: dict[tuple[float, ...], dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for layer in layers:
        steps, values = _since_restart(history, layer)
        together.setdefault(tuple(steps), {})[layer] = values
    found = {}
    for steps, of in together.items():
        scores, ratios = (np.concatenate(x, axis=1) for x in zip(*of.values()))
        steps = np.array(steps)
        root_scores, entropy_ratios = theil_sen(steps, np.sqrt(scores)), theil_sen(steps, ratios)
        start = 0
        for layer, (own, _) in of.items():
            heads = slice(start, start + own.shape[1])
            found[layer] = Trend(own[-1], root_scores.of(heads), entropy_ratios.of(heads))
            start = heads.stop
    return found


def _since_restart(
    history: Sequence[Snapshot], layer: str
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Steps (T,), and (T, H) of the largest |score| and of the entropy ratio, NaN before a head's last fall."""
    steps, stats, shape = series(history, layer, int(threshold("trend_readings")))
    scores, ratios = score_size(stats).reshape(shape), stats.entropy_ratio.reshape(shape)
    fell = scores[1:] < threshold("trend_restart") * scores[:-1]
    # Rows before the last fall are stale: True at t where some later reading fell against its predecessor.
    stale = np.zeros_like(scores, dtype=bool)
    stale[:-1] = np.logical_or.accumulate(fell[::-1], axis=0)[::-1]
    return steps, (np.where(stale, np.nan, scores), np.where(stale, np.nan, ratios))


def readings_above(history: Sequence[Snapshot], layer: str, limit: float) -> np.ndarray:
    """In how many of the last `watch_readings` readings the scores were above `limit`: (H,) ints."""
    _, stats, shape = series(history, layer, int(threshold("watch_readings")))
    return (score_size(stats).reshape(shape) > limit).sum(0)
