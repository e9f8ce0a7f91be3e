"""Head statistics: row statistics folded over batch and queries, one number per head.

A fold holds sums and maxima, so that merging two (over steps, or over ranks) is one addition and one maximum.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .fields import HISTOGRAM_BINS, MAX_FIELDS, NUM_SUMS, SUM_FIELDS
from .precision import HeadPrecision
from .rows import value_range
from .steps import HeadSteps

# Names of version 0.1, kept as deprecated aliases for one version.
_RENAMED = {
    "entropy_ratio": "normalized_entropy",
    "entropy_ratio_min": "normalized_entropy_min",
    "entropy_ratio_p10": "normalized_entropy_p10",
    "entropy_ratio_stderr": "normalized_entropy_stderr",
    "dead_share": "saturated_share",
    "dead_share_stderr": "saturated_share_stderr",
}


@dataclass(frozen=True)
class HeadStats(HeadPrecision, HeadSteps):
    """One layer's statistics, one number per head: every property is a float64 array of shape (H,).

    A number without rows to take it from (no judged rows, no rows at all) is NaN.
    If rows were sampled, means are estimates and extremes are bounds: the maximum of all rows is at least as
    large, the minimum at least as small.
    `values` is the accumulator of `reference.fold.fold_rows`, copied to the host, and behind it what `HeadSteps` reads:
    (NUM_FIELDS, H), the fields of `fields.py`, float64. A long history keeps older ones in float32.
    """

    values: np.ndarray
    head_dim: int
    dtype: str  # of q and k, "float32", "bfloat16", ...
    sample_period: int = 1  # p if one block of rows of every p was measured

    def __repr__(self) -> str:
        sampled = f" (1/{self.sample_period} of them)" if self.sampled else ""
        return (
            f"HeadStats of {self.num_heads} heads of dimension {self.head_dim}, {self.dtype}: "
            f"{value_range('rows', self.rows)}{sampled}, "
            f"{value_range('normalized_entropy', self.normalized_entropy)}, "
            f"{value_range('max_abs_logit', self.max_abs_logit)}"
        )

    def __getattr__(self, name: str) -> np.ndarray:
        current = _RENAMED.get(name)
        if current is None:
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self
            )
        warnings.warn(f"HeadStats.{name} is now {current}", DeprecationWarning, stacklevel=2)
        return getattr(self, current)

    @property
    def sampled(self) -> bool:
        return self.sample_period > 1

    @property
    def num_heads(self) -> int:
        return self.values.shape[1]

    def _sum(self, name: str) -> np.ndarray:
        return self.values[SUM_FIELDS.index(name)].astype(np.float64, copy=False)

    def _mean(self, name: str, over: str) -> np.ndarray:
        count = self._sum(over)
        return np.divide(self._sum(name), count, out=np.full_like(count, np.nan), where=count > 0)

    def _standard_error(self, name: str) -> np.ndarray:
        """Of a mean over judged rows, from the spread between blocks; see `normalized_entropy_stderr`."""
        rows, blocks, total = (self._sum(x) for x in ("judged_rows", "judged_blocks", name))
        if not self.sampled:
            return np.where(rows > 0, 0.0, np.nan)
        known = blocks > 1
        between = self._sum(f"{name}_blocks") - total**2 / np.maximum(rows, 1.0)
        variance = np.maximum(between, 0.0) / np.maximum(blocks - 1.0, 1.0) / np.maximum(rows, 1.0)
        unseen = 1.0 - 1.0 / self.sample_period  # share of the rows: those that were seen have no error
        return np.where(known, np.sqrt(variance * unseen), np.nan)

    def _max(self, name: str) -> np.ndarray:
        value = self.values[NUM_SUMS + MAX_FIELDS.index(name)].astype(np.float64, copy=False)
        return np.where(value == -np.inf, np.nan, value)

    @property
    def rows(self) -> np.ndarray:
        """Finite rows with at least one visible key."""
        return self._sum("rows")

    @property
    def judged_rows(self) -> np.ndarray:
        """Rows with at least JUDGED_MIN_KEYS visible keys, the rows that verdicts are about."""
        return self._sum("judged_rows")

    @property
    def left_out_rows(self) -> np.ndarray:
        """Rows that are not part of any other number: padding, and what a query mask leaves out."""
        return self._sum("left_out_rows")

    @property
    def empty_rows(self) -> np.ndarray:
        """Other rows whose keys are all hidden."""
        return self._sum("empty_rows")

    @property
    def nonfinite_rows(self) -> np.ndarray:
        """Other rows whose statistics are NaN or inf, because q or k is."""
        return self._sum("nonfinite_rows")

    @property
    def nonfinite_query(self) -> np.ndarray:
        """Queries that hold NaN or inf, padding included."""
        return self._sum("nonfinite_query")

    @property
    def nonfinite_key(self) -> np.ndarray:
        """Keys that hold NaN or inf, padding included."""
        return self._sum("nonfinite_key")

    @property
    def nonfinite_value(self) -> np.ndarray:
        """Values that hold NaN or inf, padding included; 0 where the values were not seen."""
        return self._sum("nonfinite_value")

    @property
    def nonfinite_out(self) -> np.ndarray:
        """Outputs of the measured rows that hold NaN or inf, padding included; 0 where the output was not seen."""
        return self._sum("nonfinite_out")

    @property
    def nonfinite_empty(self) -> np.ndarray:
        """Of `nonfinite_out`, the outputs of rows whose keys are all hidden."""
        return self._sum("nonfinite_empty")

    @property
    def entropy(self) -> np.ndarray:
        """Mean entropy over rows, nats."""
        return self._mean("entropy", "rows")

    @property
    def normalized_entropy(self) -> np.ndarray:
        """Mean of entropy / log(visible keys) over judged rows."""
        return self._mean("normalized_entropy", "judged_rows")

    @property
    def normalized_entropy_stderr(self) -> np.ndarray:
        """Standard error of the mean over judged rows: 0 if all rows were measured, NaN for a single block."""
        return self._standard_error("normalized_entropy")

    @property
    def saturated_share_stderr(self) -> np.ndarray:
        """As `normalized_entropy_stderr`."""
        return self._standard_error("saturated_rows")

    @property
    def max_weight_stderr(self) -> np.ndarray:
        """As `normalized_entropy_stderr`."""
        return self._standard_error("max_weight")

    @property
    def sink_mass_stderr(self) -> np.ndarray:
        """As `normalized_entropy_stderr`."""
        return self._standard_error("sink_mass")

    @property
    def jacobian_trace_bound_stderr(self) -> np.ndarray:
        """As `normalized_entropy_stderr`."""
        return self._standard_error("jacobian_trace_bound")

    @property
    def normalized_entropy_min(self) -> np.ndarray:
        """Smallest over judged rows."""
        return -self._max("neg_normalized_entropy")

    @property
    def normalized_entropy_p10(self) -> np.ndarray:
        """10th percentile over judged rows, to 1/32: interpolated in a histogram of 32 bins."""
        counts = self.values[len(SUM_FIELDS) : NUM_SUMS].astype(np.float64, copy=False)
        cumulative = counts.cumsum(0)
        target = 0.1 * cumulative[-1]
        index = (cumulative < target).sum(0).clip(max=HISTOGRAM_BINS - 1)
        heads = np.arange(self.num_heads)
        inside = counts[index, heads]
        before = cumulative[index, heads] - inside
        fraction = np.divide(target - before, inside, out=np.full_like(target, np.nan), where=inside > 0)
        return np.maximum((index + fraction) / HISTOGRAM_BINS, self.normalized_entropy_min)

    @property
    def saturated_share(self) -> np.ndarray:
        """Share of judged rows with normalized_entropy below SATURATED_ENTROPY."""
        return self._mean("saturated_rows", "judged_rows")

    @property
    def max_weight(self) -> np.ndarray:
        """Mean over judged rows of the largest softmax weight."""
        return self._mean("max_weight", "judged_rows")

    @property
    def sink_mass(self) -> np.ndarray:
        """Mean weight on the sink, judged rows: on the learned sink, and on the first visible key or the key that
        the rows of the head share, whichever has more.
        """
        return self._mean("sink_mass", "judged_rows")

    @property
    def rest_normalized_entropy(self) -> np.ndarray:
        """Normalized entropy of the keys but the sink, weighted with their weight; NaN where the sink has all of it.

        sum (1 - sink_mass) H_rest / log(visible keys - 1) over judged rows / sum (1 - sink_mass).
        """
        judged = self._sum("judged_rows")
        rest = judged - self._sum("sink_mass")
        known = rest > 1e-4 * judged  # below, the entropies' own rounding decides
        return np.divide(self._sum("rest_entropy"), rest, out=np.full_like(rest, np.nan), where=known)

    @property
    def stray_share(self) -> np.ndarray:
        """Share of judged rows that are saturated with less than half of their weight on the sink."""
        return self._mean("stray_rows", "judged_rows")

    @property
    def jacobian_trace_bound(self) -> np.ndarray:
        """Mean of 1 - max_weight^2 over judged rows: an upper bound of the gradient share that gets through."""
        return self._mean("jacobian_trace_bound", "judged_rows")

    @property
    def logit_range(self) -> np.ndarray:
        """Mean over rows of max_logit - min_logit, nats."""
        return self._mean("logit_range", "rows")

    @property
    def logit_range_max(self) -> np.ndarray:
        """Largest over rows, nats."""
        return self._max("logit_range")

    @property
    def max_logit(self) -> np.ndarray:
        """Largest score over rows and visible keys, nats."""
        return self._max("max_logit")

    @property
    def min_logit(self) -> np.ndarray:
        """Smallest score over rows and visible keys, nats."""
        return -self._max("neg_min_logit")

    @property
    def max_abs_logit(self) -> np.ndarray:
        """Largest |score| over rows and visible keys, nats."""
        return np.fmax(np.abs(self.max_logit), np.abs(self.min_logit))

    @property
    def score_kind(self) -> np.ndarray:
        """What else is in the scores beside scale * q.k: 0 for nothing, 1 for an additive mask, 2 for a soft-cap, a
        learned sink, or scores whose q and k are not known.
        """
        return self._max("score_kind")

    def merge(self, other: HeadStats) -> HeadStats:
        """Both folds as one: exact, associative, commutative.

        Raises ValueError for another number of heads.
        """
        shape = self.values.shape
        if shape != other.values.shape:
            raise ValueError(f"expected head statistics of shape {shape}, got {other.values.shape}")
        merged = np.add(self.values, other.values, dtype=np.float64)
        merged[NUM_SUMS:] = np.maximum(self.values[NUM_SUMS:], other.values[NUM_SUMS:])
        return HeadStats(merged, self.head_dim, self.dtype, max(self.sample_period, other.sample_period))


class Forwards(NamedTuple):
    """How many forward passes of the model made measured attention calls.

    training: under grad. evaluation: without grad. failed: ended by an exception; nothing of them is kept.
    """

    training: int = 0
    evaluation: int = 0
    failed: int = 0


class Mark(NamedTuple):
    """The extremes of the steps since a snapshot, as they stood at a later step.

    ranges: layer to the largest range of a row so far, (H,), nats: lower bounds, see `HeadSteps`.
    """

    step: int
    ranges: dict[str, np.ndarray]


@dataclass(frozen=True)
class Snapshot:
    """All layers' head statistics at one log step, in the order the layers first ran.

    training: whether it holds forwards under grad. If so, it holds no others.
    forwards: how many there were since the snapshot before; zeros where they could not be counted, as in replays of a
        captured graph.
    jumped: whether the run was taken to another state (a rewind) since the snapshot before, so that trends begin anew.
    marks: what the steps since the snapshot before showed, the latest of them, oldest first.
    """

    step: int
    layers: dict[str, HeadStats]
    training: bool = True
    forwards: Forwards = Forwards()
    jumped: bool = False
    marks: tuple[Mark, ...] = ()

    def __repr__(self) -> str:
        heads = sum(stats.num_heads for stats in self.layers.values())
        names = list(self.layers)
        if len(names) > 3:
            names[1:-1] = ["..."]
        return (
            f"Snapshot at step {self.step}: {heads} heads in {len(self.layers)} layers ({', '.join(names)}), "
            f"{self.holds}"
        )

    @property
    def holds(self) -> str:
        """Which forward passes it holds and which were left out, as text."""
        count = self.forwards.training if self.training else self.forwards.evaluation
        kind = "training" if self.training else "evaluation"
        held = _forwards(count, kind) if count else f"{kind} forwards"
        out = [_forwards(self.forwards.evaluation, "evaluation")] * bool(
            self.training and self.forwards.evaluation
        )
        out += [_forwards(self.forwards.failed, "failed")] * bool(self.forwards.failed)
        return f"{held} ({' and '.join(out)} left out)" if out else held


def _forwards(count: int, kind: str) -> str:
    return f"{count} {kind} forward{'' if count == 1 else 's'}"
