"""What is measured: row statistics of one attention call, and their fold to one number per head.

Words and units are those of the statistics contract: scores, `lse` and `entropy` are in nats.
Row statistics keep one number per (batch, head, query); head statistics fold them over batch and
queries into sums and maxima, so that merging two folds (over steps, or over ranks) is one addition
and one maximum.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

# Entropy verdicts need a row long enough to have a spread: entropy of a 3-key row says little.
JUDGED_MIN_KEYS = 16
# A row whose entropy is below this share of log(visible keys) passes almost no gradient ("dead").
DEAD_ENTROPY_RATIO = 0.02

SUM_FIELDS = (
    "rows",  # finite rows with at least one visible key
    "judged_rows",  # of those, rows with at least JUDGED_MIN_KEYS visible keys
    "nonfinite_rows",  # rows whose statistics are NaN: NaN or inf reached q or k
    "entropy",  # over rows, nats
    "logit_range",  # over rows, nats
    "entropy_ratio",  # this and the rest over judged rows only
    "max_weight",
    "sink_mass",
    "jacobian_trace_bound",  # 1 - max_weight^2 >= 1 - sum p^2 = trace of the softmax Jacobian
    "dead_rows",
)
HISTOGRAM_BINS = 32  # of entropy_ratio over [0, 1], judged rows: for percentiles
MAX_FIELDS = (
    "max_logit",
    "neg_min_logit",  # minima are kept negated, so that one maximum merges all of these
    "logit_range",
    "max_weight",
    "neg_entropy_ratio",
    "query_norm",  # Frobenius norm of the head's Q over the sequence, largest in the batch
    "key_norm",
)
NUM_SUMS = len(SUM_FIELDS) + HISTOGRAM_BINS
NUM_FIELDS = NUM_SUMS + len(MAX_FIELDS)


@dataclass(frozen=True)
class RowStats:
    """Softmax statistics of every query row; each tensor is (B, H, M), fp32 (fp64 for fp64 inputs).

    `lse`, `entropy`, `max_logit` and `min_logit` are always there; the others are None unless asked
    for with `extended=True`. `score_mean` (plain mean over visible keys, nats) and `visible_keys`
    (their number, int64) are what merging `score_std` takes. An empty row (no visible key) has
    lse = max_logit = -inf, min_logit = +inf and 0 elsewhere. A row that NaN or inf reached is NaN in
    every field but `visible_keys`.
    """

    lse: Tensor
    entropy: Tensor
    max_logit: Tensor
    min_logit: Tensor
    logit_var: Tensor | None = None
    collision: Tensor | None = None
    score_std: Tensor | None = None
    sink_mass: Tensor | None = None
    score_mean: Tensor | None = None
    visible_keys: Tensor | None = None

    @property
    def max_weight(self) -> Tensor:
        """Largest softmax weight on a key, exp(max_logit - lse); 0 for an empty row."""
        return torch.where(self.max_logit == -torch.inf, 0.0, (self.max_logit - self.lse).exp())

    @property
    def logit_range(self) -> Tensor:
        """max_logit - min_logit in nats; 0 for an empty row."""
        return torch.where(self.max_logit == -torch.inf, 0.0, self.max_logit - self.min_logit)

    @property
    def tie_mass(self) -> Tensor:
        """collision / max_weight: 1 when exact maxima hold all the mass. Needs `extended=True`."""
        if self.collision is None:
            raise ValueError("tie_mass needs the extended statistics; call with extended=True")
        return torch.where(self.max_logit == -torch.inf, 0.0, self.collision / self.max_weight)

    def merge(self, *others: RowStats, sinks: Tensor | None = None) -> RowStats:
        """The statistics of the same rows over all the keys of these disjoint key blocks, in any order.

        For ring or context-parallel attention and split-KV decoding; `merge_attention` merges the
        outputs too. Exact up to the rounding of its inputs (in fp32 at |lse| = 1e4, `lse` itself is
        good to 5e-4 nats), associative and commutative; a block in which a row sees no key is that
        row's identity. Differentiable in `lse`, `entropy` and `sinks`.

        sinks: (H,) learned sinks. Give them here, once, and to none of the blocks: a sink is one
            element of the whole row's softmax, and a block whose keys are all hidden would lose it.
        Where some block lacks a field, so does the result. `sink_mass` is None: which block holds the
        first visible key is not known here.
        Raises ValueError or TypeError when blocks differ in shape, dtype or device.
        """
        from .merge import merge_rows  # which makes RowStats

        return merge_rows((self, *others), sinks)[0]

    def detach(self) -> RowStats:
        """The same numbers, outside the autograd graph."""
        values = (getattr(self, f.name) for f in fields(self))
        return RowStats(*(None if v is None else v.detach() for v in values))


def new_accumulator(num_heads: int, device: torch.device | str) -> Tensor:
    """An empty fold, (NUM_FIELDS, H) fp64: NUM_SUMS sums at 0, then the maxima at -inf."""
    accumulator = torch.zeros(NUM_FIELDS, num_heads, dtype=torch.float64, device=device)
    accumulator[NUM_SUMS:] = -torch.inf
    return accumulator


def fold_rows(
    accumulator: Tensor,
    stats: RowStats,
    visible_keys: Tensor,
    sink_mass: Tensor,
    query_norm: Tensor,
    key_norm: Tensor,
) -> None:
    """Add one call's rows to `accumulator` in place: the specification of `kernels/fold.py`.

    visible_keys: integers broadcastable to (B, H, M). sink_mass: (B, H, M).
    query_norm, key_norm: (H,). Empty rows are left out of everything; non-finite rows are only
    counted. No host synchronisation.
    """
    entropy = stats.entropy.double()
    visible = visible_keys.to(entropy.device).expand(entropy.shape)
    occupied = visible > 0
    finite = occupied & stats.entropy.isfinite() & stats.max_logit.isfinite() & stats.min_logit.isfinite()
    judged = finite & (visible >= JUDGED_MIN_KEYS)
    ratio = entropy / visible.clamp(min=2).double().log()
    max_weight = stats.max_weight.double()
    logit_range = stats.logit_range.double()

    def total(values: Tensor, rows: Tensor) -> Tensor:
        return torch.where(rows, values, 0.0).sum((0, 2), dtype=torch.float64)

    def largest(values: Tensor, rows: Tensor) -> Tensor:
        masked = torch.where(rows, values.double(), -torch.inf).transpose(0, 1).flatten(1)
        # amax has no identity: a call without rows (a zero-length sequence) gets one to reduce.
        return torch.nn.functional.pad(masked, (0, 1), value=-torch.inf).amax(1)

    one = torch.ones_like(entropy)
    sums = {
        "rows": total(one, finite),
        "judged_rows": total(one, judged),
        "nonfinite_rows": total(one, occupied & ~finite),
        "entropy": total(entropy, finite),
        "logit_range": total(logit_range, finite),
        "entropy_ratio": total(ratio, judged),
        "max_weight": total(max_weight, judged),
        "sink_mass": total(sink_mass, judged),
        "jacobian_trace_bound": total(1.0 - max_weight.square(), judged),
        "dead_rows": total(one, judged & (ratio < DEAD_ENTROPY_RATIO)),
    }
    maxima = {
        "max_logit": largest(stats.max_logit, finite),
        "neg_min_logit": largest(-stats.min_logit, finite),
        "logit_range": largest(logit_range, finite),
        "max_weight": largest(max_weight, judged),
        "neg_entropy_ratio": largest(-ratio, judged),
        "query_norm": query_norm.double(),
        "key_norm": key_norm.double(),
    }
    bins = (ratio * HISTOGRAM_BINS).nan_to_num().clamp(0, HISTOGRAM_BINS - 1).long()
    heads = torch.arange(entropy.shape[1], device=entropy.device)[:, None]
    histogram = torch.zeros(HISTOGRAM_BINS, entropy.shape[1], dtype=torch.float64, device=entropy.device)
    histogram.index_put_((bins, heads.expand(bins.shape)), judged.double(), accumulate=True)

    accumulator[: len(SUM_FIELDS)] += torch.stack([sums[name] for name in SUM_FIELDS])
    accumulator[len(SUM_FIELDS) : NUM_SUMS] += histogram
    stacked = torch.stack([maxima[name] for name in MAX_FIELDS])
    # A NaN norm must not hide the other maxima of later calls; the row count already tells of it.
    stacked = stacked.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    torch.maximum(accumulator[NUM_SUMS:], stacked, out=accumulator[NUM_SUMS:])


@dataclass(frozen=True)
class HeadStats:
    """One layer's statistics, one number per head: every property is a float64 array of shape (H,).

    A number that no row could give (no judged rows, no rows at all) is NaN.
    `values` is the accumulator of `fold_rows`, copied to the host: (NUM_FIELDS, H).
    """

    values: np.ndarray
    head_dim: int
    dtype: str  # of q and k, "float32", "bfloat16", ...

    @property
    def num_heads(self) -> int:
        return self.values.shape[1]

    def _sum(self, name: str) -> np.ndarray:
        return self.values[SUM_FIELDS.index(name)]

    def _mean(self, name: str, over: str) -> np.ndarray:
        count = self._sum(over)
        return np.divide(self._sum(name), count, out=np.full_like(count, np.nan), where=count > 0)

    def _max(self, name: str) -> np.ndarray:
        value = self.values[NUM_SUMS + MAX_FIELDS.index(name)]
        return np.where(value == -np.inf, np.nan, value)

    @property
    def rows(self) -> np.ndarray:
        """Finite rows with at least one visible key."""
        return self._sum("rows")

    @property
    def judged_rows(self) -> np.ndarray:
        """Rows with at least JUDGED_MIN_KEYS visible keys, over which ratios are taken."""
        return self._sum("judged_rows")

    @property
    def nonfinite_rows(self) -> np.ndarray:
        return self._sum("nonfinite_rows")

    @property
    def entropy(self) -> np.ndarray:
        """Mean entropy over rows, nats."""
        return self._mean("entropy", "rows")

    @property
    def entropy_ratio(self) -> np.ndarray:
        """Mean of entropy / log(visible keys) over judged rows."""
        return self._mean("entropy_ratio", "judged_rows")

    @property
    def entropy_ratio_min(self) -> np.ndarray:
        return -self._max("neg_entropy_ratio")

    @property
    def entropy_ratio_p10(self) -> np.ndarray:
        """10th percentile over judged rows, to 1/32: interpolated in a histogram of 32 bins."""
        counts = self.values[len(SUM_FIELDS) : NUM_SUMS]
        target = 0.1 * counts.sum(0)
        cumulative = counts.cumsum(0)
        index = (cumulative < target).sum(0).clip(max=HISTOGRAM_BINS - 1)
        heads = np.arange(self.num_heads)
        inside = counts[index, heads]
        before = cumulative[index, heads] - inside
        fraction = np.divide(target - before, inside, out=np.full_like(target, np.nan), where=inside > 0)
        return np.maximum((index + fraction) / HISTOGRAM_BINS, self.entropy_ratio_min)

    @property
    def dead_share(self) -> np.ndarray:
        """Share of judged rows with entropy_ratio below DEAD_ENTROPY_RATIO."""
        return self._mean("dead_rows", "judged_rows")

    @property
    def max_weight(self) -> np.ndarray:
        """Mean over judged rows of the largest softmax weight."""
        return self._mean("max_weight", "judged_rows")

    @property
    def sink_mass(self) -> np.ndarray:
        """Mean weight on the first visible key (and the learned sink), judged rows."""
        return self._mean("sink_mass", "judged_rows")

    @property
    def jacobian_trace_bound(self) -> np.ndarray:
        """Mean of 1 - max_weight^2: an upper bound of the gradient share that gets through."""
        return self._mean("jacobian_trace_bound", "judged_rows")

    @property
    def logit_range(self) -> np.ndarray:
        """Mean over rows of max_logit - min_logit, nats."""
        return self._mean("logit_range", "rows")

    @property
    def logit_range_max(self) -> np.ndarray:
        return self._max("logit_range")

    @property
    def max_logit(self) -> np.ndarray:
        return self._max("max_logit")

    @property
    def min_logit(self) -> np.ndarray:
        return -self._max("neg_min_logit")

    @property
    def max_abs_logit(self) -> np.ndarray:
        return np.fmax(np.abs(self.max_logit), np.abs(self.min_logit))

    @property
    def query_norm(self) -> np.ndarray:
        """Frobenius norm of Q per head, largest in the batch; at least its spectral norm."""
        return self._max("query_norm")

    @property
    def key_norm(self) -> np.ndarray:
        return self._max("key_norm")

    def merge(self, other: HeadStats) -> HeadStats:
        """Both folds as one: exact, associative, commutative."""
        if self.values.shape != other.values.shape:
            raise ValueError(
                f"expected head statistics of shape {self.values.shape}, got {other.values.shape}"
            )
        merged = self.values + other.values
        merged[NUM_SUMS:] = np.maximum(self.values[NUM_SUMS:], other.values[NUM_SUMS:])
        return HeadStats(merged, self.head_dim, self.dtype)


@dataclass(frozen=True)
class Snapshot:
    """All layers' head statistics at one log step, in the order the layers first ran."""

    step: int
    layers: dict[str, HeadStats]
