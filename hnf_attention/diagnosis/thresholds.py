"""Every threshold of the diagnosis, once, with its source. A verdict is changed here and nowhere else."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from ..errors import InputError
from ..statistics.fields import SATURATED_ENTROPY

_RUNS = (
    "own calibration on 158 small training runs (calibrated on one seed, judged on held-out seeds; by the largest "
    "|score|, of which the size is 0.84 in the median head of the demo's runs)"
)
_LABORATORY = "own laboratory (docs/validation.md), calibration runs"
_MINILM = (
    "own calibration on a healthy model (all-MiniLM-L6-v2; five texts in windows of 16 to 384 tokens): 71 of its "
    "72 heads are above"
)


@dataclass(frozen=True)
class Threshold:
    """A number that decides something, its unit, and its source."""

    value: float
    unit: str
    source: str


THRESHOLDS: dict[str, Threshold] = {
    # Growth of the scores, by their size: half of the largest range of a row in one snapshot. For scores that reach as
    # far up as down that is the largest |score|, of which the published limits speak.
    "watch_logit": Threshold(60.0, "nats", f"{_RUNS}: three snapshots above it, recall 1.00, precision 0.80"),
    "clip_logit": Threshold(
        100.0, "nats", "Kimi K2, arXiv 2507.20534: QK-clip acts above 100; healthy runs pass it early on"
    ),
    "deteriorating_logit": Threshold(
        1e3, "nats", "Wortsman et al., arXiv 2309.14322: the loss suffers near 1e3"
    ),
    "diverged_logit": Threshold(
        1e4, "nats", "Wortsman et al., arXiv 2309.14322: every run above 1e4 diverged"
    ),
    "warning_logit": Threshold(
        150.0,
        "nats",
        f"{_LABORATORY}: in the first layer, by the trend line; warnings came in 97% of harmed runs and 19% of clean "
        "ones",
    ),
    "warning_horizon": Threshold(100, "steps", f"{_LABORATORY}: how far the warning's line is projected"),
    "warning_floor": Threshold(20.0, "nats", f"{_LABORATORY}: smaller scores may grow fast and stop"),
    "alarm_logit": Threshold(
        100.0, "nats", f"{_LABORATORY}: in the first layer and most layers, by the trend line"
    ),
    "standing_logit": Threshold(
        300.0, "nats", "own choice: three times alarm_logit, for scores whose growth is not known"
    ),
    "alarm_layers": Threshold(
        0.75, "of layers", f"{_LABORATORY}: fewer layers with such scores often do no harm"
    ),
    "watch_snapshots": Threshold(3, "snapshots", f"{_RUNS}: so many in a row above watch_logit"),
    "alarm_horizon": Threshold(50, "steps", f"{_LABORATORY}: how far the alarm's line is projected"),
    "trend_steps": Threshold(50, "steps", f"{_LABORATORY}: length of the trend window, at any cadence"),
    "trend_snapshots": Threshold(10, "snapshots", "own choice: the most that a trend line is fitted to"),
    "trend_snapshots_min": Threshold(3, "snapshots", f"{_LABORATORY}: fewer give no line"),
    "trend_span": Threshold(20, "steps", f"{_LABORATORY}: a line through fewer follows the noise of batches"),
    "trend_restart": Threshold(
        0.5,
        "of the snapshot before",
        "own choice: scores that fall below half at once (a fix, a restart) begin a new trend",
    ),
    "rising_share": Threshold(
        0.1, "of the level", "own choice: sqrt(size) rose by this share within the trend window"
    ),
    # When a head of an alarm passes alarm_logit: the line's steps and a delay, times a factor for each end of the
    # interval.
    "forecast_delay": Threshold(
        10, "steps", f"{_LABORATORY}: the median head passes so many steps later than its line"
    ),
    "forecast_low": Threshold(
        0.41, "of the forecast", f"{_LABORATORY}: one head in ten passes alarm_logit before this"
    ),
    "forecast_high": Threshold(
        4.1, "times the forecast", f"{_LABORATORY}: one head in ten passes alarm_logit after this, or never"
    ),
    # Number formats: what the scores themselves overflow. IEEE 754 and the bfloat16 format.
    "fp16_product": Threshold(
        65504.0, "", "IEEE 754 binary16: q.k before scaling is infinite above this if stored in fp16"
    ),
    "stored_rounding": Threshold(
        1.0,
        "nats",
        "IEEE 754 and the bfloat16 format: rounding of a stored score, unit roundoff times |score|",
    ),
    "naive_exp_float16": Threshold(11.09, "nats", "IEEE 754 binary16: log of its largest number"),
    "naive_exp": Threshold(88.72, "nats", "IEEE 754 binary32, and bfloat16: log of the largest number"),
    # A score far below zero in a head whose largest score is ordinary is a bias, not growth.
    "bias_floor": Threshold(
        100.0, "nats below 0", "own choice: ALiBi slopes and mask fills (-1e4, finfo.min) lie below this"
    ),
    "bias_ratio": Threshold(
        10.0,
        "times the |maximum|",
        "own choice: the minimum is a bias if it is more than this many times as large",
    ),
    # Sharpness, over rows with at least 16 visible keys.
    "collapsed_entropy": Threshold(
        0.05, "of log(visible keys)", f"{_MINILM} 0.13 on average; a previous-token head is below 0.05"
    ),
    "low_entropy": Threshold(
        0.15,
        "of log(visible keys)",
        f"{_MINILM} it, but for heads with a sink; a previous-token head is below 0.05",
    ),
    "low_tenth": Threshold(
        0.05,
        "of log(visible keys)",
        f"{_MINILM} it in the 10th percentile of their rows, but for heads with a sink",
    ),
    "collapsed_saturation": Threshold(
        0.9,
        "of rows",
        f"own choice: nine rows in ten have a normalized entropy below {SATURATED_ENTROPY} away from the sink",
    ),
    "high_saturation": Threshold(
        0.1,
        "of rows",
        f"own calibration: rows with a normalized entropy below {SATURATED_ENTROPY} away from the sink; in "
        "all-MiniLM-L6-v2 71 of 72 heads have at most 0.06 of them, a previous-token head has 0.64 to 0.98",
    ),
    "layer_share": Threshold(
        0.5,
        "of heads",
        "own laboratory (docs/validation.md), models at the end of their training: warnings come in 6 of 49 clean "
        "ones if so many heads of a layer have collapsed, in 33 if they are sharp; one such head is a trained "
        "pattern (previous token: Voita et al., arXiv 1905.09418)",
    ),
    "collapse_horizon": Threshold(500, "steps", "own choice: a collapse further ahead is not forecast"),
    "forecast_reach": Threshold(
        3, "trend windows", "own choice: a collapse further ahead than this is not forecast either"
    ),
    "forecast_entropy": Threshold(
        0.5, "of log(visible keys)", "own choice: no collapse is forecast above half of the maximal entropy"
    ),
    "sink_mass": Threshold(
        0.3,
        "of weight",
        "Gu et al., arXiv 2410.10781: a head with this much weight on one key that its rows share has a sink",
    ),
    "sink_rest": Threshold(
        0.2,
        "of weight",
        "own choice: the keys beside a sink are judged if they have at least this much weight",
    ),
    "low_rest": Threshold(
        0.1,
        "of log(visible keys)",
        f"{_MINILM} 0.13 in the keys beside a sink; a previous-token head is below 0.05",
    ),
    "sharp_rest": Threshold(
        0.3,
        "of log(visible keys)",
        "own choice: the keys beside a sink, on average over a layer whose heads all rest; broad attention has more",
    ),
    "dormant_sink": Threshold(
        0.99,
        "of weight",
        "own choice: more weight on the sink leaves the other keys a hundredth of the output; for all heads at once "
        "no trained model is known (Gu et al., arXiv 2410.10781)",
    ),
    "one_hot_weight": Threshold(
        0.95, "of weight", "the project's proposal: mean largest weight of a nearly one-hot head"
    ),
    "weak_gradient": Threshold(
        0.05,
        "of 1",
        "own choice: the trace of the softmax Jacobian, 1 - 1/n for uniform weights, is below a twentieth",
    ),
    "lost_gradient": Threshold(
        0.005, "of 1", "own choice: less than a two-hundredth of the softmax gradient gets through"
    ),
    "nonfinite_rows": Threshold(
        0.0, "numbers", "IEEE 754: NaN and inf spread to all that is computed from them"
    ),
    "empty_rows": Threshold(0.0, "rows", "IEEE 754: the softmax of a row without a key is 0 / 0"),
}

_overrides: ContextVar[Mapping[str, float] | None] = ContextVar("threshold overrides", default=None)


def threshold(name: str) -> float:
    """The number of one entry of the table, or what the caller of `diagnose` put in its place."""
    overrides = _overrides.get()
    return overrides[name] if overrides and name in overrides else THRESHOLDS[name].value


def checked_thresholds(thresholds: Mapping[str, float] | None) -> dict[str, float]:
    """The numbers by name. Raises InputError for a name that is not in THRESHOLDS, and for what is no finite number."""
    if thresholds is not None and not isinstance(thresholds, Mapping):
        raise InputError(
            f"expected thresholds to be a dict of numbers by name, got {type(thresholds).__name__}"
        )
    checked: dict[str, float] = {}
    for name, value in (thresholds or {}).items():
        if name not in THRESHOLDS:
            near = ", ".join(get_close_matches(str(name), THRESHOLDS, 3, 0.0))
            raise InputError(f"expected the name of a threshold, got {name!r}; the nearest are {near}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise InputError(f"expected threshold {name!r} to be a finite number, got {value!r}")
        checked[name] = float(value)
    return checked


def differing(thresholds: Mapping[str, Any]) -> dict[str, float]:
    """Those among these numbers by name that are thresholds, finite, and other than the table's.

    A file may hold anything under such a name: whatever else it is, is left out.
    """
    return {
        name: float(value)
        for name, value in thresholds.items()
        if name in THRESHOLDS
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max  # a whole number may be too large for `math.isfinite`
        and value != THRESHOLDS[name].value
    }


@contextmanager
def overridden(thresholds: Mapping[str, float]) -> Iterator[None]:
    """Within the block, `threshold` gives these numbers. They come from `checked_thresholds`."""
    token = _overrides.set(thresholds)
    try:
        yield
    finally:
        _overrides.reset(token)
