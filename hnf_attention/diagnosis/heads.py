"""The heads of many layers in one array, so that each number is computed once rather than once per layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from ..statistics.fields import MAX_FIELDS, NUM_FIELDS, NUM_SUMS, SUM_FIELDS
from ..statistics.heads import HeadStats, Snapshot
from .thresholds import threshold
from .trends import Forecast, Line, Trail, forecast, score_size, stale, theil_sen

_KEYS = NUM_SUMS + MAX_FIELDS.index("num_keys")
# What `score_size`, `has_bias` and `HeadStats.normalized_entropy` are computed from.
_RANGE_FIELDS = [NUM_SUMS + MAX_FIELDS.index(name) for name in ("logit_range", "score_kind")]
_BIAS_FIELDS = [
    NUM_SUMS + MAX_FIELDS.index(name) for name in ("max_logit", "neg_min_logit", "query_square", "key_square")
]
_ENTROPY_FIELDS = [SUM_FIELDS.index(name) for name in ("normalized_entropy", "judged_rows")]


@dataclass(frozen=True)
class Heads:
    """The heads of some layers, one layer after the other, (H,) each: where they are and how they got there."""

    layers: Sequence[str]
    snapshots: Sequence[Snapshot]  # T of them, oldest first, with all the layers; the last one is judged
    stats: HeadStats  # of the last snapshot
    places: Sequence[tuple[str, int]]  # layer, and the head's number in it
    layer: np.ndarray  # index of the layer in `layers`
    layer_heads: np.ndarray  # number of heads in the layer
    scores: np.ndarray  # `score_size` at every snapshot, (T, H)
    trail: Trail  # the sizes that the trend of the scores is fitted to
    company: Sequence[Heads] = field(
        repr=False, compare=False
    )  # all heads that are judged together, these too

    @property
    def score(self) -> np.ndarray:
        """Size of the scores of the last snapshot, nats: half of the largest range of a row."""
        return self.scores[-1]

    @cached_property
    def root_score(self) -> Line:
        """Line of sqrt(size of the scores), since the scores last fell at once (a fix, a restart)."""
        steps, sizes = self.trail
        return theil_sen(steps, np.where(stale(sizes), np.nan, np.sqrt(sizes)))

    @cached_property
    def normalized_entropy(self) -> Line:
        """Line of the normalized entropy over the same snapshots."""
        stats = _joined(self.stats, self.snapshots, self.layers, _ENTROPY_FIELDS)
        values = stats.normalized_entropy.reshape(self.scores.shape)
        return theil_sen(_steps(self.snapshots), np.where(stale(self.scores), np.nan, values))

    def score_ahead(self, steps: float | np.ndarray) -> np.ndarray:
        """Projected size of the scores that many steps after the last snapshot, nats; the size now without a line.

        A line that falls is not followed: scores that shrink for a while promise nothing.
        """
        line = self.root_score
        ahead = np.maximum(line.level + np.maximum(line.slope, 0.0) * steps, 0.0) ** 2
        return np.where(np.isnan(ahead), self.score, ahead)

    def steps_until_score(self, score: float) -> np.ndarray:
        """Steps from the last snapshot until the projected size of the scores is `score`; NaN if never."""
        return self.root_score.steps_until(score**0.5)

    @cached_property
    def saturation(self) -> Forecast:
        """When the scores of an alarming head pass `alarm_logit`; NaN for those that move away from it."""
        return forecast(self.steps_until_score(threshold("alarm_logit")))

    @cached_property
    def rising(self) -> np.ndarray:
        """Whether the scores clearly grew within the window."""
        line = self.root_score
        return line.slope * line.span > threshold("rising_share") * np.abs(line.level)

    @cached_property
    def risen(self) -> np.ndarray:
        """Whether the scores are clearly larger than at the start of the window, of two snapshots or more."""
        return self.score > (1.0 + threshold("rising_share")) ** 2 * self.scores[0]

    @cached_property
    def first(self) -> np.ndarray:
        """Heads of the model's first layer, boolean (H,)."""
        return np.array([name == next(iter(self.snapshots[-1].layers)) for name in self.layers])[self.layer]

    @cached_property
    def grown(self) -> np.ndarray:
        """Heads whose scores are large, or soon are in the first layer: unstable rather than specialised.

        What the first layer loses, no later one has.
        """
        soon = self.score_ahead(threshold("warning_horizon")) > threshold("warning_logit")
        large = self.score > threshold("clip_logit")
        return large | (self.first & soon & (self.score > threshold("warning_floor")))

    @property
    def finished(self) -> bool:
        """Whether the model does not train, so that nothing can be known of its growth."""
        return not self.snapshots[-1].training

    @cached_property
    def alarming(self) -> np.ndarray:
        """Heads whose scores are soon large, and so are those of the first layer and of most layers.

        A model gets along with a few such layers, but not without its first one. In a finished model, and in the first
        steps of a run, scores have to be much larger: they may always have been large.
        """
        return self._passes & self._widespread

    @cached_property
    def _passes(self) -> np.ndarray:
        soon = self.score_ahead(threshold("alarm_horizon")) > threshold("alarm_logit")
        return np.where(self.known | self.underway, soon, self.score > threshold("standing_logit"))

    @property
    def underway(self) -> bool:
        """Whether a run has trained for a trend window, however seldom it was read: its large scores have grown."""
        latest = self.snapshots[-1]
        return latest.training and latest.step >= threshold("trend_steps")

    @property
    def _widespread(self) -> bool:
        """Whether a head passes in the first layer, and in `alarm_layers` of the layers at least."""
        layers: dict[str, bool] = {}
        for heads in self.company:
            count = np.bincount(heads.layer, heads._passes, minlength=len(heads.layers))
            layers |= dict(zip(heads.layers, (count > 0).tolist()))
        first = layers.get(next(iter(self.snapshots[-1].layers)), False)
        return first and sum(layers.values()) >= threshold("alarm_layers") * len(layers)

    @property
    def known(self) -> np.ndarray:
        """Heads of which it is known whether they grow: those with a line."""
        return ~np.isnan(self.root_score.slope)

    @cached_property
    def resting(self) -> np.ndarray:
        """Heads with a sink, wherever it is, whose scores did not grow: sharp, and meant to be."""
        return (self.stats.sink_mass > threshold("sink_mass")) & ~self.grown

    @cached_property
    def stray(self) -> np.ndarray:
        """Share of the rows that are saturated: of a head with a sink, away from it."""
        return np.where(self.resting, self.stats.stray_share, self.stats.saturated_share)

    @cached_property
    def sharpness(self) -> np.ndarray:
        """Normalized entropy that is judged: of a head with a sink, that of its other keys, 1 if they weigh little.

        A sink excuses a head and never accuses it. Trained heads rest on two keys at once (Sun et al.,
        arXiv 2402.17762: the first token and the first full stop). Beside one of the two, the other is a single sharp
        key. So the entropy of all keys is judged where it is the larger one.
        """
        stats = self.stats
        if not self.resting.any():
            return stats.normalized_entropy
        rest = np.maximum(stats.rest_normalized_entropy, stats.normalized_entropy)
        heavy = 1.0 - stats.sink_mass >= threshold("sink_rest")
        return np.where(self.resting, np.where(heavy, rest, 1.0), stats.normalized_entropy)

    @cached_property
    def low(self) -> np.ndarray:
        """Heads with little entropy in their rows, on average or in a tenth of them."""
        limit = np.where(self.resting, threshold("low_rest"), threshold("low_entropy"))
        return (self.sharpness < limit) | self._low_tenth | (self.stray > threshold("high_saturation"))

    @property
    def _low_tenth(self) -> np.ndarray:
        """Heads without a sink whose 10th percentile is low; it is at least the minimum."""
        limit = threshold("low_tenth")
        low = ~self.resting & (self.stats.normalized_entropy_min < limit)
        if low.any():
            low[low] = replace(self.stats, values=self.stats.values[:, low]).normalized_entropy_p10 < limit
        return low

    @cached_property
    def collapsed(self) -> np.ndarray:
        """Heads with almost no entropy in their rows; each of them is `low` too."""
        few = self.stray > threshold("collapsed_saturation")
        return self.low & ((self.sharpness < threshold("collapsed_entropy")) | few)

    @cached_property
    def weak(self) -> np.ndarray:
        """Heads whose softmax lets little gradient through, sinks aside."""
        return ~self.resting & (self.stats.jacobian_trace_bound < threshold("weak_gradient"))

    def snapshots_above(self, limit: float) -> np.ndarray:
        """In how many of the last `watch_snapshots` snapshots the scores were above `limit`."""
        return (self.scores[-int(threshold("watch_snapshots")) :] > limit).sum(0)

    def in_layer(self, chosen: np.ndarray) -> np.ndarray:
        """How many heads of each head's layer a boolean (H,) chooses."""
        return np.bincount(self.layer, chosen)[self.layer]

    def most_of_layer(self, chosen: np.ndarray) -> np.ndarray:
        """Heads in whose layer a boolean (H,) chooses most heads; a single one of several is never most."""
        count = self.in_layer(chosen)
        return (count >= threshold("layer_share") * self.layer_heads) & (
            count >= np.minimum(2, self.layer_heads)
        )


def _steps(snapshots: Sequence[Snapshot]) -> np.ndarray:
    return np.array([snapshot.step for snapshot in snapshots], dtype=np.float64)


def _trail(
    latest: HeadStats, snapshots: Sequence[Snapshot], layers: Sequence[str], scores: np.ndarray
) -> Trail:
    """The scores of the snapshots, with those of the marks between them where there are some.

    A mark is a range, so it says nothing of a head with a bias in its scores.
    """
    points = []
    plain = scores[-1] == latest.logit_range_max / 2.0
    for snapshot, score in zip(snapshots, scores):
        for mark in snapshot.marks:
            ranges = [mark.ranges[layer] for layer in layers if layer in mark.ranges]
            sizes = np.concatenate([[], *ranges]) / 2.0
            if len(sizes) == len(score):
                points.append((mark.step, np.where(plain & np.isfinite(sizes), sizes, np.nan)))
        points.append((snapshot.step, score))
    steps, sizes = np.array([step for step, _ in points], dtype=np.float64), np.stack([x for _, x in points])
    if len(points) == len(snapshots):
        return Trail(steps, sizes)
    near = int((steps >= steps[-1] - threshold("trend_steps")).sum())
    last = min(max(near, int(threshold("trend_snapshots_min"))), len(points))
    chosen = len(points) - 1 - _spread(last)
    return Trail(steps[chosen[::-1]], sizes[chosen[::-1]])


def _spread(number: int) -> np.ndarray:
    """So many numbers from 0, or `trend_snapshots` of them at equal distances if there are more."""
    most = int(threshold("trend_snapshots"))
    return np.arange(number) if number <= most else np.linspace(0, number - 1, most).round().astype(int)


def concatenate_heads(history: Sequence[Snapshot], layers: Iterable[str], marks: bool = False) -> list[Heads]:
    """The heads of these layers of the latest snapshot, in as few `Heads` as can hold them.

    marks: whether trends go through the marks between snapshots, too. A mark is of some rows, so it rises where later
    rows are larger ones: that is enough to look, and no proof of growth.

    Layers share one if they agree in what one HeadStats says once (head dimension, dtype, sampling, number of
    keys) and appear in the same snapshots.
    """
    together: dict[tuple, list[str]] = {}
    for layer in layers:
        stats = history[-1].layers[layer]
        # The error bound of a HeadStats is that of its largest number of keys.
        described = stats.head_dim, stats.dtype, stats.sample_period, stats.values[_KEYS].max(initial=0.0)
        together.setdefault((described, _ages(history, layer)), []).append(layer)
    found: list[Heads] = []
    for (_, ages), names in together.items():
        found.append(_heads([history[-1 - age] for age in reversed(ages)], names, found, marks))
    return found


def _ages(history: Sequence[Snapshot], layer: str) -> tuple[int, ...]:
    """How many snapshots ago the layer appeared within the trend window, newest first.

    The window is `trend_steps` long, but holds `trend_snapshots_min` snapshots if there are as many. Of more than
    `trend_snapshots`, these many are taken at equal distances. Snapshots without the layer are skipped; a change of
    its number of heads ends the series, and so does a rewind.
    """
    heads, latest = history[-1].layers[layer].num_heads, history[-1].step
    oldest, enough = latest - threshold("trend_steps"), threshold("trend_snapshots_min")
    found: list[int] = []
    for age, snapshot in enumerate(reversed(history)):
        stats = snapshot.layers.get(layer)
        if stats is not None:
            if stats.num_heads != heads or (snapshot.step < oldest and len(found) >= enough):
                break
            found.append(age)
        if snapshot.jumped:
            break
    return tuple(found[index] for index in _spread(len(found)).tolist())


def _heads(
    snapshots: Sequence[Snapshot], layers: Sequence[str], company: Sequence[Heads], marks: bool
) -> Heads:
    latest = [snapshots[-1].layers[layer] for layer in layers]
    counts = [stats.num_heads for stats in latest]
    scores = score_size(_sizes(latest[0], snapshots, layers))
    together = replace(latest[0], values=np.concatenate([stats.values for stats in latest], axis=1))
    scores = scores.reshape(len(snapshots), -1)
    return Heads(
        layers,
        snapshots,
        together,
        [(layer, head) for layer, count in zip(layers, counts) for head in range(count)],
        np.repeat(np.arange(len(layers)), counts),
        np.repeat(counts, counts),
        scores,
        _trail(together, snapshots, layers, scores) if marks else Trail(_steps(snapshots), scores),
        company,
    )


def _sizes(like: HeadStats, snapshots: Sequence[Snapshot], layers: Sequence[str]) -> HeadStats:
    """The heads of all layers, one snapshot after the other, with what `score_size` reads."""
    stats = _joined(like, snapshots, layers, _RANGE_FIELDS)
    if (stats.score_kind > 0).any():  # only then is there a bias to look for
        return _joined(like, snapshots, layers, _RANGE_FIELDS + _BIAS_FIELDS)
    return stats


def _joined(
    like: HeadStats, snapshots: Sequence[Snapshot], layers: Sequence[str], fields: Sequence[int]
) -> HeadStats:
    """The heads of all layers, one snapshot after the other, (T * H,); only these fields are filled."""
    parts = [snapshot.layers[layer].values for snapshot in snapshots for layer in layers]
    values = np.empty((NUM_FIELDS, sum(part.shape[1] for part in parts)))
    for row in fields:
        np.concatenate([part[row] for part in parts], out=values[row])
    return replace(like, values=values)
