"""Scores that are too large, or soon will be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ...statistics.heads import HeadStats, Snapshot
from ..heads import Heads
from ..issue import StabilityIssue
from ..thresholds import threshold
from .wording import CLIP, CLIP_AND_SLOW, head_name, make_issue, peak


class _Verdict(NamedTuple):
    """The worst limit that a head breaks."""

    severity: str
    name: str  # of the threshold
    value: float
    why: str


def rule(history: Sequence[Snapshot], heads: Heads) -> Iterator[StabilityIssue]:
    """Scores above published growth limits or the range of fp16, and scores on their way there."""
    stats, size = heads.stats, heads.score
    projected = heads.score_ahead(threshold("alarm_horizon"))
    suspicious = (size > threshold("watch_logit")) | (projected > threshold("alarm_logit"))
    if not suspicious.any():
        return
    bounds, bits, usual = stats.error_bound, stats.required_bits, stats.typical_bits
    watched = heads.snapshots_above(threshold("watch_logit"))
    eta = heads.steps_until_score(threshold("alarm_logit"))
    for head in np.flatnonzero(suspicious).tolist():
        verdict = _verdict(stats, size[head], watched[head], projected[head], eta[head])
        if verdict is None:
            continue
        place = heads.places[head]
        evidence = (
            f"{head_name(place)}: largest |score| {peak(stats, size[head])} at step {history[-1].step}, "
            f"{verdict.why}{_pace(heads, head)}{_naive(stats, size[head])}"
            f"{_rounding(bounds[head], bits[head], usual[head])}"
        )
        suggestion = CLIP_AND_SLOW if verdict.severity == "error" else f"{CLIP} if it keeps rising"
        yield make_issue(
            "overflow_risk", verdict.severity, place, verdict.value, verdict.name, evidence, suggestion
        )


def _verdict(stats: HeadStats, size: float, watched: int, projected: float, eta: float) -> _Verdict | None:
    """Judge one head.

    size: its largest |score|, nats. watched: in how many of the last snapshots that was above `watch_logit`.
    projected: the size at the alarm's horizon. eta: steps until the projection meets `alarm_logit`.
    """
    product = size * stats.head_dim**0.5
    if stats.dtype == "float16" and product > threshold("fp16_product"):
        why = f"so q.k before scaling reaches {product:.4g}: infinite if it is stored in fp16"
        return _Verdict("error", "fp16_product", product, why)
    if size > threshold("diverged_logit"):
        return _Verdict("error", "diverged_logit", size, "beyond where published runs diverged")
    if size > threshold("deteriorating_logit"):
        return _Verdict("error", "deteriorating_logit", size, "beyond where published runs deteriorated")
    if projected > threshold("alarm_logit"):
        when = f"in about {eta:.0f} steps" if np.isfinite(eta) else "now"
        why = f"and its trend passes {threshold('alarm_logit'):.0f} {when}"
        return _Verdict("error", "alarm_logit", projected, why)
    if size > threshold("clip_logit"):
        why = "beyond where Kimi K2 clips (healthy runs pass it early on)"
        return _Verdict("warning", "clip_logit", size, why)
    if watched >= threshold("watch_snapshots"):
        why = f"above {threshold('watch_logit'):.0f} for {watched} snapshots in a row"
        return _Verdict("warning", "watch_logit", size, why)
    return None


def _pace(heads: Heads, head: int) -> str:
    if not heads.rising[head]:
        return ""
    return f"; its square root grows by {100 * heads.root_score.slope[head]:.2g} per 100 steps"


def _naive(stats: HeadStats, size: float) -> str:
    limit = threshold("naive_exp_float16" if stats.dtype == "float16" else "naive_exp")
    if size <= limit:
        return ""
    return f"; without max subtraction, exp overflows past {limit}"


def _rounding(bound: float, bits: float, usual: float) -> str:
    """What the scores cost in precision (`error_bound`, `typical_bits`, `required_bits`), if it is known."""
    if not np.isfinite(bound + bits):
        return ""
    return f"; rounding error up to {bound:.2g} of the largest |v|; q, k need {usual:.0f} bits, {bits:.0f} at worst"
