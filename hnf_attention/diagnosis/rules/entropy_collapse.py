"""Heads whose rows attend to almost nothing, and heads on their way there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ...statistics.heads import Snapshot
from ..heads import Heads
from ..issue import StabilityIssue
from ..thresholds import threshold
from .criteria import corroborated, sink_by_design
from .wording import CLIP, CLIP_AND_SLOW, head_name, make_issue, peak, plus_minus


def rule(history: Sequence[Snapshot], heads: Heads) -> Iterator[StabilityIssue]:
    """Low entropy is a warning; it is an error with large or rising scores, or in half of a layer.

    A sink head is sharp by design and left out, unless its scores are large too.
    """
    entropy, saturated = heads.stats.normalized_entropy, heads.stats.saturated_share
    judged = ~sink_by_design(heads)
    low = judged & ((entropy < threshold("low_entropy")) | (saturated > threshold("high_saturation")))
    if low.any():
        collapsed = judged & (
            (entropy < threshold("collapsed_entropy")) | (saturated > threshold("collapsed_saturation"))
        )
        yield from _sharp(history[-1].step, heads, low, collapsed)
    yield from _forecasts(history[-1].step, heads, judged & ~low)


def _sharp(step: int, heads: Heads, low: np.ndarray, collapsed: np.ndarray) -> Iterator[StabilityIssue]:
    """Heads whose entropy is low, some of which have collapsed."""
    stats = heads.stats
    entropy, stderr = stats.normalized_entropy, stats.normalized_entropy_stderr
    tenth, saturated, sink = stats.normalized_entropy_p10, stats.saturated_share, stats.sink_mass
    real = collapsed & corroborated(heads, collapsed)
    alike = np.where(collapsed, heads.in_layer(collapsed), heads.in_layer(low))
    for head in np.flatnonzero(low).tolist():
        place = heads.places[head]
        name, value = _broken_threshold(entropy[head], saturated[head], collapsed[head])
        evidence = (
            f"{head_name(place)}: normalized entropy {entropy[head]:.3f}{plus_minus(stderr[head])} (10th "
            f"percentile {tenth[head]:.3f}, {saturated[head]:.0%} of rows saturated) at step {step}; such heads "
            f"in this layer: {alike[head]:.0f} of {heads.layer_heads[head]}; scores up to "
            f"{peak(stats, heads.score[head])}{' and rising' if heads.rising[head] else ''}{_sink(sink[head])}"
        )
        if real[head]:
            severity = "error"
            suggestion = f"{CLIP}, or raise this head's attention temperature (get_intervention proposes one)"
        else:
            severity = "warning"
            suggestion = "watch it; if more heads follow, raise the layer's attention temperature"
        yield make_issue("entropy_collapse", severity, place, value, name, evidence, suggestion)


def _broken_threshold(entropy: float, saturated: float, collapsed: bool) -> tuple[str, float]:
    """The name of the threshold that a sharp head breaks, and the value that breaks it."""
    by_entropy, by_saturation = (
        ("collapsed_entropy", "collapsed_saturation") if collapsed else ("low_entropy", "high_saturation")
    )
    return (by_entropy, entropy) if entropy < threshold(by_entropy) else (by_saturation, saturated)


def _sink(sink: float) -> str:
    large = sink > threshold("sink_mass")
    return f"; a sink head ({sink:.2f} on the first key) with large scores" if large else ""


def _forecasts(step: int, heads: Heads, judged: np.ndarray) -> Iterator[StabilityIssue]:
    """Heads whose normalized entropy falls towards collapse while their scores rise to the watch level.

    Falling entropy alone is what learning looks like; with growing scores it is the instability.
    """
    entropy = heads.stats.normalized_entropy
    candidates = judged & heads.rising & (entropy < threshold("forecast_entropy"))
    if not candidates.any():
        return
    line, stderr = heads.normalized_entropy, heads.stats.normalized_entropy_stderr
    eta = line.steps_until(threshold("collapsed_entropy"))
    horizon = np.minimum(threshold("collapse_horizon"), threshold("forecast_reach") * line.span)
    falling = (line.slope < 0) & (eta <= horizon)
    large_by_then = heads.score_ahead(eta) > threshold("watch_logit")
    for head in np.flatnonzero(candidates & falling & large_by_then).tolist():
        place, value = heads.places[head], entropy[head]
        evidence = (
            f"{head_name(place)}: will collapse in about {eta[head]:.0f} steps: normalized entropy "
            f"{value:.3f}{plus_minus(stderr[head])} at step {step} falls by "
            f"{-100 * line.slope[head]:.2g} per 100 steps, while the largest |score| "
            f"({peak(heads.stats, heads.score[head])}) rises"
        )
        yield make_issue(
            "entropy_collapse", "warning", place, value, "collapsed_entropy", evidence, CLIP_AND_SLOW
        )
