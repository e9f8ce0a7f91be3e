"""Heads whose rows attend to almost nothing, and heads on their way there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ...statistics.heads import Snapshot
from ..heads import Heads
from ..issue import Crossing, StabilityIssue
from ..thresholds import threshold
from .criteria import severities
from .wording import CLIP, RESTART, SHORT_CLIP, SHORT_RESTART, Scores, head_name, make_issue, plus_minus


def rule(history: Sequence[Snapshot], heads: Heads) -> Iterator[StabilityIssue]:
    """Low entropy, on average or in a tenth of the rows; see `criteria.severities`.

    A head with a sink is judged by its other keys, unless its scores have grown.
    """
    low = heads.low
    if low.any():
        yield from _sharp(history[-1].step, heads, low, heads.collapsed)
    yield from _forecasts(history[-1].step, heads, ~heads.resting & ~low)


def _sharp(step: int, heads: Heads, low: np.ndarray, collapsed: np.ndarray) -> Iterator[StabilityIssue]:
    """Heads whose entropy is low, some of which have collapsed. One issue holds all that is sharp about a head."""
    stats, scores = heads.stats, Scores(heads)
    entropy, stderr = stats.normalized_entropy, stats.normalized_entropy_stderr
    tenth, saturated = stats.normalized_entropy_p10, stats.saturated_share
    sink, rest = stats.sink_mass, stats.rest_normalized_entropy
    gradient, weight = stats.jacobian_trace_bound, stats.max_weight
    severity = severities(heads, low, collapsed)
    alike = np.where(collapsed, heads.in_layer(collapsed), heads.in_layer(low))
    for head in np.flatnonzero(low).tolist():
        place = heads.places[head]
        name, value = _broken_threshold(heads, head, tenth[head], collapsed[head])
        company = f"such heads in this layer: {alike[head]:.0f} of {heads.layer_heads[head]}"
        evidence = (
            f"{head_name(place)}: normalized entropy {entropy[head]:.3f}{plus_minus(stderr[head])} (10th "
            f"percentile {tenth[head]:.3f}, {saturated[head]:.0%} of rows saturated) at step {step}; largest weight "
            f"{weight[head]:.2f}, at most {gradient[head]:.2g} of the softmax gradient gets through; {company}; "
            f"{scores.text(head)}{' and rising' if heads.rising[head] else ''}{_sink(sink[head], rest[head])}"
        )
        suggestion, cure = _advice(severity[head], heads.grown[head], heads.finished)
        rows = f", {saturated[head]:.0%} of rows saturated" if saturated[head] >= 0.005 else ""
        brief = f"normalized entropy {entropy[head]:.3f}{rows}, {scores.short(head)} -> {cure}"
        yield make_issue("entropy_collapse", severity[head], place, value, name, evidence, suggestion, brief)


def _advice(severity: str, grown: bool, finished: bool) -> tuple[str, str]:
    """What to do about a sharp head, whole and in a few words."""
    if severity == "error":
        return (
            f"{CLIP}, or raise this head's attention temperature (get_intervention proposes one)",
            SHORT_CLIP,
        )
    if grown:
        return f"{CLIP} if the entropy falls further", f"{SHORT_CLIP} if it falls further"
    if finished and severity == "note":
        return (
            "nothing to do: many trained models have heads that are this sharp (previous token, an earlier copy), and "
            "layers of them",
            "nothing to do, common in trained models",
        )
    if finished:
        return (
            "check on other data whether these heads differ, and that the weights belong to this architecture",
            "check on other data",
        )
    return (
        "nothing to do while its scores do not grow: trained heads that follow one pattern (the previous "
        "token, an earlier copy) are this sharp",
        "nothing to do while its scores do not grow",
    )


def _broken_threshold(heads: Heads, head: int, tenth: float, collapsed: bool) -> tuple[str, float]:
    """The name of the threshold that a sharp head breaks, and the value that breaks it."""
    entropy, stray = heads.sharpness[head], heads.stray[head]
    resting = heads.resting[head]
    by_entropy = "collapsed_entropy" if collapsed else "low_rest" if resting else "low_entropy"
    by_rows = "collapsed_saturation" if collapsed else "high_saturation"
    if entropy < threshold(by_entropy):
        return by_entropy, entropy
    return (by_rows, stray) if stray > threshold(by_rows) else ("low_tenth", tenth)


def _sink(mass: float, rest: float) -> str:
    if not mass > threshold("sink_mass"):
        return ""
    beside = f", normalized entropy {rest:.3f} beside it" if np.isfinite(rest) else ""
    return f"; {mass:.2f} of the weight is on a sink{beside}"


def _forecasts(step: int, heads: Heads, judged: np.ndarray) -> Iterator[StabilityIssue]:
    """Heads whose normalized entropy falls towards collapse while their scores rise to the watch level.

    Falling entropy alone is what learning looks like, and growing scores are too. A warning is for scores that are
    large, or soon are in the first layer.
    """
    entropy = heads.stats.normalized_entropy
    candidates = judged & heads.rising & (entropy < threshold("forecast_entropy"))
    if not candidates.any():
        return
    line, stderr, scores = heads.normalized_entropy, heads.stats.normalized_entropy_stderr, Scores(heads)
    eta = line.steps_until(threshold("collapsed_entropy"))
    horizon = np.minimum(threshold("collapse_horizon"), threshold("forecast_reach") * line.span)
    falling = (line.slope < 0) & (eta <= horizon)
    large_by_then = heads.score_ahead(eta) > threshold("watch_logit")
    for head in np.flatnonzero(candidates & falling & large_by_then).tolist():
        place, value = heads.places[head], entropy[head]
        evidence = (
            f"{head_name(place)}: will collapse in about {eta[head]:.0f} steps: normalized entropy "
            f"{value:.3f}{plus_minus(stderr[head])} at step {step} falls by "
            f"{-100 * line.slope[head]:.2g} per 100 steps, while the {scores.text(head)} and rising"
        )
        severity, suggestion, cure = "note", f"{CLIP} if it goes on", f"{SHORT_CLIP} if it goes on"
        if heads.grown[head]:
            severity, suggestion, cure = "warning", RESTART, SHORT_RESTART
        brief = (
            f"{scores.short(head)}{scores.pace(head)}; normalized entropy {value:.3f}, will collapse near step "
            f"{step + eta[head]:.0f} -> {cure}"
        )
        collapsed = threshold("collapsed_entropy")
        forecast = Crossing("collapses", "normalized_entropy", collapsed, step, step + float(eta[head]))
        yield make_issue(
            "entropy_collapse",
            severity,
            place,
            value,
            "collapsed_entropy",
            evidence,
            suggestion,
            brief,
            forecast,
        )
