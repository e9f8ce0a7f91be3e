"""Scores that are too large, or soon will be: for training by their range, for number formats by their size."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ...statistics.heads import HeadStats, Snapshot
from ...theory import number_format
from ..heads import Heads
from ..issue import SEVERITIES, Crossing, StabilityIssue
from ..thresholds import threshold
from ..trends import product_size
from .wording import CLIP, RESTART, SHORT_CLIP, SHORT_RESTART, Scores, head_name, make_issue

FORMAT_ADVICE = (
    "run attention in bf16 or fp32, scale q before the product, or use SDPA, which does not store scores"
)
FORMAT_CURE = "bf16 or fp32, SDPA, or scale q before the product"
_ROUNDED_ADVICE = (
    "run attention in fp32, or take out the number that all scores of a row share (a key bias): the softmax does not "
    "see it, and the format pays for it"
)


class _Verdict(NamedTuple):
    """The worst limit that a head breaks."""

    severity: str
    name: str  # of the threshold
    value: float
    why: str
    suggestion: str
    brief: str
    cure: str


class _Formats(NamedTuple):
    """What number formats have to hold, (H,) each."""

    product: np.ndarray  # largest |q.k| before scaling where it may be stored in fp16, else 0
    rounding: np.ndarray  # of the largest |scale * q.k| if it is stored in the layer's dtype, nats


def rule(history: Sequence[Snapshot], heads: Heads) -> Iterator[StabilityIssue]:
    """Score ranges above published growth limits, ranges on their way there, and scores that a format cannot hold."""
    size, formats = heads.score, _formats(heads.stats)
    growing = (size > threshold("watch_logit")) | heads.grown | heads.alarming
    lost = formats.rounding > threshold("stored_rounding")
    suspicious = growing | lost | (formats.product > threshold("fp16_product"))
    if not suspicious.any():
        return
    stats, scores = heads.stats, Scores(heads)
    bounds, bits, usual, largest = stats.error_bound, stats.required_bits, stats.typical_bits, stats.max_logit
    watched = heads.snapshots_above(threshold("watch_logit"))
    step = history[-1].step
    for head in np.flatnonzero(suspicious).tolist():
        growth = _growth(heads, head, watched[head])
        stored = _stored(stats.dtype, formats.product[head], formats.rounding[head])
        verdict = _together(growth, stored)
        if verdict is None:
            continue
        place = heads.places[head]
        evidence = (
            f"{head_name(place)}: {scores.text(head)} at step {step}{verdict.why}{_pace(heads, head)}"
            f"{_naive(stats, largest[head])}{_rounding(bounds[head], bits[head], usual[head])}"
        )
        brief = f"{scores.short(head)}{scores.pace(head)}{verdict.brief} -> {verdict.cure}"
        yield make_issue(
            "overflow_risk",
            verdict.severity,
            place,
            verdict.value,
            verdict.name,
            evidence,
            verdict.suggestion,
            brief,
            _crossing(heads, head, step) if verdict.name == "alarm_logit" else None,
        )


def _crossing(heads: Heads, head: int, step: int) -> Crossing | None:
    """When the scores pass `alarm_logit`; None for scores that are there, or whose growth is not known."""
    coming = heads.saturation
    if not (heads.known[head] and np.isfinite(coming.steps[head])):
        return None
    limit = threshold("alarm_logit")
    after = (float(each[head]) for each in coming)
    return Crossing(
        f"passes {limit:g} nats to either side",
        "logit_range_max",
        2.0 * limit,
        step,
        *(step + each for each in after),
    )


def _formats(stats: HeadStats) -> _Formats:
    largest = product_size(stats)
    half = stats.dtype == "float16"
    unit = 0.0
    with contextlib.suppress(ValueError):  # a format that the theory does not know
        form = number_format(stats.dtype)
        unit = 0.0 if form.is_eight_bit else form.unit  # attention of 8-bit numbers keeps its scores in fp32
    return _Formats(largest * stats.head_dim**0.5 if half else np.zeros_like(largest), unit * largest)


def _growth(heads: Heads, head: int, watched: int) -> _Verdict | None:
    """Judge one head by the range of its scores, whose half is their size.

    watched: in how many of the last snapshots the size was above `watch_logit`.
    """
    size, verdict = heads.score[head], None
    error, warning, note = SEVERITIES
    half = f", {size:.4g} to either side"
    if size > threshold("diverged_logit"):
        verdict = error, "diverged_logit", size, f"{half}, beyond where published runs diverged", ""
    elif size > threshold("deteriorating_logit"):
        severity = error if heads.alarming[head] else warning
        verdict = (
            severity,
            "deteriorating_logit",
            size,
            f"{half}, beyond where published runs deteriorated",
            "",
        )
    elif heads.alarming[head] and not heads.known[head]:
        limit = "alarm_logit" if heads.underway else "standing_logit"
        verdict = error, limit, size, f"{half}, as in the first layer and in most layers", ""
    elif heads.alarming[head]:
        coming = np.isfinite(heads.saturation.steps[head])
        soon = f"; saturates {heads.saturation.text(head)}" if coming else "; saturated"
        value = heads.score_ahead(threshold("alarm_horizon"))[head]
        why = f"{half}, and by its trend {value:.4g} within {threshold('alarm_horizon'):.0f} steps, as in the first "
        when = (
            f"; it passes {threshold('alarm_logit'):g} to either side {heads.saturation.text(head)}"
            if coming
            else ""
        )
        verdict = error, "alarm_logit", value, f"{why}layer and in most layers{when}", soon
    elif size > threshold("clip_logit"):
        verdict = warning, "clip_logit", size, f"{half}, beyond where Kimi K2 clips", ""
    elif heads.grown[head]:
        value = heads.score_ahead(threshold("warning_horizon"))[head]
        why = f"{half}, and by its trend {value:.4g} within {threshold('warning_horizon'):.0f} steps"
        verdict = warning, "warning_logit", value, f"{why} in the first layer", ""
    elif watched >= threshold("watch_snapshots"):
        why = f"{half}, above {threshold('watch_logit'):.0f} for {watched} snapshots in a row"
        verdict = note, "watch_logit", size, why, ""
    if verdict is None:
        return None
    severity, name, value, why, brief = verdict
    suggestion, cure = {
        error: (RESTART, SHORT_RESTART),
        warning: (f"{CLIP} if it keeps rising", f"{SHORT_CLIP} if it keeps rising"),
        note: ("nothing to do while the scores do not grow", "nothing to do while it does not grow"),
    }[severity]
    return _Verdict(severity, name, value, why, suggestion, brief, cure)


def _stored(dtype: str, product: float, rounding: float) -> _Verdict | None:
    """Judge one head by what its scores are stored in. A common offset counts here, and QK-clip is no cure for it."""
    _, warning, note = SEVERITIES
    if product > threshold("fp16_product"):
        what = f"q.k before scaling reaches {product:.4g}, infinite where attention stores it in fp16"
        limits = warning, "fp16_product", product, f"; {what}", FORMAT_ADVICE, f"; {what}", FORMAT_CURE
    elif rounding > threshold("stored_rounding"):
        what = f"scores stored in {dtype} are off by up to {rounding:.2g} nats"
        cure = "fp32, or take out the common offset"
        limits = note, "stored_rounding", rounding, f"; {what}", _ROUNDED_ADVICE, f"; {what}", cure
    else:
        return None
    return _Verdict(*limits)


def _together(growth: _Verdict | None, stored: _Verdict | None) -> _Verdict | None:
    """One verdict of both: growth decides, and the format's advice is added."""
    if growth is None or stored is None:
        return growth or stored
    if SEVERITIES.index(stored.severity) < SEVERITIES.index(growth.severity):
        growth = growth._replace(severity=stored.severity, name=stored.name, value=stored.value)
    return growth._replace(
        why=growth.why + stored.why, suggestion=f"{growth.suggestion}; for the format, {stored.suggestion}"
    )


def _pace(heads: Heads, head: int) -> str:
    if not heads.rising[head]:
        return ""
    return f"; the square root of its size grows by {100 * heads.root_score.slope[head]:.2g} per 100 steps"


def _naive(stats: HeadStats, largest: float) -> str:
    limit = threshold("naive_exp_float16" if stats.dtype == "float16" else "naive_exp")
    if not largest > limit:
        return ""
    return f"; without max subtraction, exp overflows past {limit}"


def _rounding(bound: float, bits: float, usual: float) -> str:
    """What the scores cost in precision (`error_bound`, `typical_bits`, `required_bits`), if it is known."""
    said = []
    if bound <= 2.0:  # a larger one says nothing: outputs lie within the values
        said.append(f"rounding error up to {bound:.2g} of the largest |v|")
    if np.isfinite(bits):
        said.append(f"q, k need {usual:.0f} bits, {bits:.0f} at worst")
    return "".join(f"; {part}" for part in said)
