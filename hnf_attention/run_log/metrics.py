"""Which statistics of a head a run log holds, and how two log steps become one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from ..statistics.heads import HeadStats


class Metric(NamedTuple):
    """One number per head and log step.

    name: a property of `HeadStats`. label: for people. unit: "" for a number without one. joined: what two log steps
    become where there is room for one of them: "max" or "min" keeps the extreme, "mean" their mean. low_is_bad: whether
    the head with the lowest number is the one to look at.
    """

    name: str
    label: str
    unit: str
    joined: str
    low_is_bad: bool = False


METRICS = (
    Metric("normalized_entropy", "normalized entropy, mean over rows", "", "mean", low_is_bad=True),
    Metric("normalized_entropy_min", "normalized entropy, lowest row", "", "min", low_is_bad=True),
    Metric(
        "normalized_entropy_p10", "normalized entropy, 10th percentile of rows", "", "min", low_is_bad=True
    ),
    Metric("entropy", "entropy, mean over rows", "nats", "mean", low_is_bad=True),
    Metric("max_weight", "largest softmax weight, mean over rows", "", "mean"),
    Metric("sink_mass", "weight on the sink, mean over rows", "", "mean"),
    Metric("saturated_share", "share of saturated rows", "", "max"),
    Metric(
        "jacobian_trace_bound", "bound of the gradient that passes the softmax", "", "mean", low_is_bad=True
    ),
    Metric("logit_range", "range of a row's scores, mean over rows", "nats", "mean"),
    Metric("logit_range_max", "range of a row's scores, largest", "nats", "max"),
    Metric("max_logit", "largest score", "nats", "max"),
    Metric("min_logit", "smallest score", "nats", "min", low_is_bad=True),
    Metric("between_max_logit", "largest score seen between log steps (a lower bound)", "nats", "max"),
    Metric(
        "between_logit_range", "largest range of scores seen between log steps (a lower bound)", "nats", "max"
    ),
    Metric("first_nonfinite_step", "step of the first NaN or inf", "step", "min", low_is_bad=True),
    Metric("query_norm", "norm of the longest query", "", "max"),
    Metric("key_norm", "norm of the longest key", "", "max"),
    Metric("log2_curvature", "HNF curvature", "bits", "max"),
    Metric("error_bound", "bound of the output's relative rounding error", "", "max"),
    Metric("required_bits", "mantissa bits that the worst row needs", "bits", "max"),
    Metric("typical_bits", "mantissa bits that a typical row needs", "bits", "mean"),
    Metric("judged_rows", "rows that verdicts are about", "rows", "min", low_is_bad=True),
    Metric("nonfinite_rows", "rows whose statistics are NaN or inf", "rows", "max"),
    Metric("empty_rows", "rows whose keys are all hidden", "rows", "max"),
)
NAMES = tuple(metric.name for metric in METRICS)

_JOIN: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "max": np.fmax,
    "min": np.fmin,
    "mean": lambda a, b: np.where(np.isnan(a), b, np.where(np.isnan(b), a, (a + b) / 2)),
}
_HOW = {metric.name: metric.joined for metric in METRICS}


def table(layers: Mapping[str, HeadStats]) -> np.ndarray:
    """float32 (metrics, heads of all layers) in the order of `METRICS` and of the layers."""
    heads = sum(stats.num_heads for stats in layers.values())
    values = np.empty((len(METRICS), heads), dtype=np.float32)
    start = 0
    with np.errstate(over="ignore", invalid="ignore"):
        for stats in layers.values():
            end = start + stats.num_heads
            for row, metric in zip(values, METRICS):
                row[start:end] = getattr(stats, metric.name)
            start = end
    return values


def joined(names: list[str], earlier: np.ndarray, later: np.ndarray) -> np.ndarray:
    """Two tables (metrics, heads) of neighbouring log steps as one. A metric that is not known takes the mean."""
    rows = [_JOIN[_HOW.get(name, "mean")](a, b) for name, a, b in zip(names, earlier, later, strict=True)]
    return np.stack(rows).astype(np.float32)
