"""What is measured: row statistics of one attention call, and their fold to one number per head.

Scores, `lse` and `entropy` are in nats. Row statistics keep one number per (batch, head, query); head
statistics fold them over batch and queries into sums and maxima, so that merging two folds (over steps,
or over ranks) is one addition and one maximum.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from ..reference.sampling import BLOCK_ROWS
from . import represent
from .precision import HeadPrecision

# Entropy verdicts need a row long enough to have a spread: entropy of a 3-key row says little.
JUDGED_MIN_KEYS = 16
# A row whose entropy is below this share of log(visible keys) passes almost no gradient ("dead").
SATURATED_ENTROPY = 0.02

# Means over judged rows that have a standard error where rows are sampled. Rows come in blocks, and rows
# of a block are alike, so the error is taken from the spread between blocks (Cochran, Sampling
# Techniques, 1977, chapter 9), for which each field has a sum of (sum over a block)^2 / rows of the block.
ERROR_FIELDS = ("normalized_entropy", "max_weight", "sink_mass", "jacobian_trace_bound", "saturated_rows")
SUM_FIELDS = (
    "rows",  # finite rows with at least one visible key
    "judged_rows",  # of those, rows with at least JUDGED_MIN_KEYS visible keys
    "nonfinite_rows",  # rows whose statistics are NaN: NaN or inf reached q or k
    "entropy",  # over rows, nats
    "logit_range",  # over rows, nats
    "normalized_entropy",  # this and the rest over judged rows only
    "max_weight",
    "sink_mass",
    "jacobian_trace_bound",  # 1 - max_weight^2 >= 1 - sum p^2 = trace of the softmax Jacobian
    "saturated_rows",
    "judged_blocks",  # blocks of BLOCK_ROWS places of a batch element with a judged row
    *(f"{name}_blocks" for name in ERROR_FIELDS),
    "sequences",  # batch elements, whatever their rows; of a pack, its sequences that hold a token
    "query_square",  # over all rows of those (not only finite or sampled), |q|^2; one that holds NaN is left out
    "key_square",  # over the keys of the head, |k|^2; likewise
)
HISTOGRAM_BINS = 32  # of normalized_entropy over [0, 1], judged rows: for percentiles
MAX_FIELDS = (
    "max_logit",
    "neg_min_logit",  # minima are kept negated, so that one maximum merges all of these
    "logit_range",
    "max_weight",
    "neg_normalized_entropy",
    "neg_max_weight",  # over all finite rows, judged or not
    "query_square",  # scale^2 |q|^2, over the rows of the sum of that name
    "key_square",  # |k|^2, likewise
    "num_keys",  # of a call, whichever its rows see; of a pack, all its tokens
    "score_kind",  # as `fold.Measured` has it
)
NUM_SUMS = len(SUM_FIELDS) + HISTOGRAM_BINS
NUM_FIELDS = NUM_SUMS + len(MAX_FIELDS)
# What `extended=True` adds to a RowStats, in the order that the kernels write them.
EXTENDED_FIELDS = ("logit_var", "collision", "score_std", "sink_mass", "score_mean", "visible_keys")


@dataclass(frozen=True)
class RowStats:
    """Softmax statistics of every query row; each tensor is (B, H, M), fp32 (fp64 for fp64 inputs).

    `lse`, `entropy`, `max_logit` and `min_logit` are always there; the others are None unless asked
    for with `extended=True`. `score_mean` (plain mean over visible keys, nats) and `visible_keys`
    (their number, int64) are what merging `score_std` takes. An empty row (no visible key) has
    lse = max_logit = -inf, min_logit = +inf and 0 elsewhere. A row that NaN or inf reached is NaN in
    every field but `visible_keys`.

    A sample of rows is compact: row i of (b, h) is query `row_index[b, h, i]`, int64 (B, H, M_s). Where
    that is -1 there is no query, and the statistics are those of an empty row.
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
    row_index: Tensor | None = None

    def __repr__(self) -> str:
        return represent.rows(self)

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
        first visible key is not known here. Samples merge where all blocks took the same (period, phase).
        Raises ValueError or TypeError when blocks differ in shape, dtype, device or rows.
        """
        from .merge import merge_rows

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
    query_square: Tensor,
    key_square: Tensor,
    sequences: Tensor | None = None,
    scale: float = 1.0,
    score_kind: int = 0,
) -> None:
    """Add one call's rows to `accumulator` in place: the specification of `kernels/fold.py`.

    What is measured beside the rows has the shapes that `fold.Measured` says. Empty rows are left out of
    everything but the squared lengths and `sequences`, non-finite rows are only counted. A call without
    rows changes nothing, and of one with an infinite scale (q.k is not known) no bound is told. No host
    synchronisation.
    """
    if stats.lse.numel() == 0:
        return
    entropy, num_keys = stats.entropy.double(), key_square.shape[2]
    lowest = torch.full_like(accumulator[0], -torch.inf)
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
        return torch.where(rows, values.double(), -torch.inf).amax((0, 2))

    def of_blocks(values: Tensor) -> Tensor:
        """Sums over judged rows of BLOCK_ROWS places; each batch element starts a new block: (H, blocks)."""
        chosen = torch.where(judged, values.double(), 0.0)
        padded = torch.nn.functional.pad(chosen, (0, -chosen.shape[2] % BLOCK_ROWS))
        return padded.unflatten(2, (-1, BLOCK_ROWS)).sum(3).transpose(0, 1).flatten(1)

    one = torch.ones_like(entropy)
    judged_values = {
        "normalized_entropy": ratio,
        "max_weight": max_weight,
        "sink_mass": sink_mass,
        "jacobian_trace_bound": 1.0 - max_weight.square(),
        "saturated_rows": (ratio < SATURATED_ENTROPY).double(),
    }
    block_rows = of_blocks(one)
    sums = {
        "rows": total(one, finite),
        "judged_rows": total(one, judged),
        "nonfinite_rows": total(one, occupied & ~finite),
        "entropy": total(entropy, finite),
        "logit_range": total(logit_range, finite),
        "judged_blocks": (block_rows > 0).sum(1).double(),
        "sequences": torch.ones_like(accumulator[0]) * (entropy.shape[0] if sequences is None else sequences),
        "query_square": total(query_square.double(), ~query_square.isnan()),
        "key_square": total(key_square.double(), ~key_square.isnan()),
    }
    for name, values in judged_values.items():
        sums[name] = total(values, judged)
        sums[f"{name}_blocks"] = (of_blocks(values).square() / block_rows.clamp(min=1.0)).sum(1)
    maxima = {
        "max_logit": largest(stats.max_logit, finite),
        "neg_min_logit": largest(-stats.min_logit, finite),
        "logit_range": largest(logit_range, finite),
        "max_weight": largest(max_weight, judged),
        "neg_normalized_entropy": largest(-ratio, judged),
        "neg_max_weight": largest(-max_weight, finite),
        "query_square": -lowest
        if math.isinf(scale)
        else scale**2 * largest(query_square, ~query_square.isnan()),
        "key_square": largest(key_square, ~key_square.isnan()) if num_keys else lowest,
        "num_keys": torch.full_like(accumulator[0], num_keys),
        "score_kind": torch.full_like(accumulator[0], score_kind),
    }
    bins = (ratio * HISTOGRAM_BINS).nan_to_num().clamp(0, HISTOGRAM_BINS - 1).long()
    heads = torch.arange(entropy.shape[1], device=entropy.device)[:, None]
    histogram = torch.zeros(HISTOGRAM_BINS, entropy.shape[1], dtype=torch.float64, device=entropy.device)
    histogram.index_put_((bins, heads.expand(bins.shape)), judged.double(), accumulate=True)

    accumulator[: len(SUM_FIELDS)] += torch.stack([sums[name] for name in SUM_FIELDS])
    accumulator[len(SUM_FIELDS) : NUM_SUMS] += histogram
    stacked = torch.stack([maxima[name] for name in MAX_FIELDS])
    torch.maximum(accumulator[NUM_SUMS:], stacked, out=accumulator[NUM_SUMS:])


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
class HeadStats(HeadPrecision):
    """One layer's statistics, one number per head: every property is a float64 array of shape (H,).

    A number that no row could give (no judged rows, no rows at all) is NaN.
    Of a sample of the rows, means are estimates and extremes are bounds: no maximum of all rows is
    smaller, no minimum larger.
    `values` is the accumulator of `fold_rows`, copied to the host: (NUM_FIELDS, H).
    """

    values: np.ndarray
    head_dim: int
    dtype: str  # of q and k, "float32", "bfloat16", ...
    sample_period: int = 1  # p where only one block of rows of every p was measured

    def __repr__(self) -> str:
        return represent.heads(self)

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
        return self.values[SUM_FIELDS.index(name)]

    def _mean(self, name: str, over: str) -> np.ndarray:
        count = self._sum(over)
        return np.divide(self._sum(name), count, out=np.full_like(count, np.nan), where=count > 0)

    def _standard_error(self, name: str) -> np.ndarray:
        """Of a mean over judged rows, from the spread between blocks; 0 of all rows, NaN of a single block."""
        rows, blocks, total = (self._sum(x) for x in ("judged_rows", "judged_blocks", name))
        if not self.sampled:
            return np.where(rows > 0, 0.0, np.nan)
        known = blocks > 1
        between = self._sum(f"{name}_blocks") - total**2 / np.maximum(rows, 1.0)
        variance = np.maximum(between, 0.0) / np.maximum(blocks - 1.0, 1.0) / np.maximum(rows, 1.0)
        unseen = 1.0 - 1.0 / self.sample_period  # of the rows: what was seen has no error
        return np.where(known, np.sqrt(variance * unseen), np.nan)

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
    def normalized_entropy(self) -> np.ndarray:
        """Mean of entropy / log(visible keys) over judged rows."""
        return self._mean("normalized_entropy", "judged_rows")

    @property
    def normalized_entropy_stderr(self) -> np.ndarray:
        """This and those like it: of a sample's mean; 0 where all rows were measured, NaN of a single block."""
        return self._standard_error("normalized_entropy")

    @property
    def saturated_share_stderr(self) -> np.ndarray:
        return self._standard_error("saturated_rows")

    @property
    def max_weight_stderr(self) -> np.ndarray:
        return self._standard_error("max_weight")

    @property
    def sink_mass_stderr(self) -> np.ndarray:
        return self._standard_error("sink_mass")

    @property
    def jacobian_trace_bound_stderr(self) -> np.ndarray:
        return self._standard_error("jacobian_trace_bound")

    @property
    def normalized_entropy_min(self) -> np.ndarray:
        return -self._max("neg_normalized_entropy")

    @property
    def normalized_entropy_p10(self) -> np.ndarray:
        """10th percentile over judged rows, to 1/32: interpolated in a histogram of 32 bins."""
        counts = self.values[len(SUM_FIELDS) : NUM_SUMS]
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

    def merge(self, other: HeadStats) -> HeadStats:
        """Both folds as one: exact, associative, commutative."""
        shape = self.values.shape
        if shape != other.values.shape:
            raise ValueError(f"expected head statistics of shape {shape}, got {other.values.shape}")
        merged = self.values + other.values
        merged[NUM_SUMS:] = np.maximum(self.values[NUM_SUMS:], other.values[NUM_SUMS:])
        return HeadStats(merged, self.head_dim, self.dtype, max(self.sample_period, other.sample_period))


@dataclass(frozen=True)
class Snapshot:
    """All layers' head statistics at one log step, in the order the layers first ran."""

    step: int
    layers: dict[str, HeadStats]
