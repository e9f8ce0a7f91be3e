"""The rules: each reads heads and yields issues about their latest snapshot.

What only the sentences need is computed where some head breaks the rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..names import display_name
from ..statistics.heads import HeadStats, Snapshot
from .heads import Heads
from .issue import StabilityIssue
from .thresholds import THRESHOLDS, threshold

CLIP = "apply QK-clip at 30 after the optimizer step"
CLIP_AND_SLOW = (
    f"{CLIP} and halve the learning rate (get_intervention proposes both); QK-norm is the lasting fix"
)


def non_finite(history: Sequence[Snapshot], heads: Heads) -> Iterator[StabilityIssue]:
    """Rows that NaN or inf reached. The first layer to show them, in execution order, is the origin."""
    bad = heads.stats.nonfinite_rows
    if not bad.any():
        return
    total = heads.stats.rows + bad
    step, origin = _origin(history)
    for head in np.flatnonzero(bad):
        place = heads.places[head]
        share = bad[head] / total[head]
        where = "this layer is" if place[0] == origin else f"layer {display_name(origin)} was"
        evidence = (
            f"{_head(place)}: {bad[head]:.0f} of {total[head]:.0f} rows ({share:.1%}) are not "
            f"finite at step {history[-1].step}; {where} the first to show it, at step {step}"
        )
        suggestion = (
            "restore the last checkpoint with finite weights, then lower the learning rate; "
            f"look for the overflow in {display_name(origin)} and what feeds it"
        )
        yield _issue("non_finite", "error", place, share, "nonfinite_rows", evidence, suggestion)


def overflow_risk(history: Sequence[Snapshot], heads: Heads) -> Iterator[StabilityIssue]:
    """Scores that are, or soon will be, too large: published growth limits, fp16 range, own alarm."""
    stats, size = heads.stats, heads.score
    projected = heads.score_ahead(threshold("alarm_horizon"))
    suspicious = (size > threshold("watch_logit")) | (projected > threshold("alarm_logit"))
    if not suspicious.any():
        return
    bounds, bits, usual = stats.error_bound, stats.required_bits, stats.typical_bits
    watched = heads.snapshots_above(threshold("watch_logit"))
    eta = heads.steps_until_score(threshold("alarm_logit"))
    for head in np.flatnonzero(suspicious):
        tier = _overflow_tier(stats, size[head], watched[head], projected[head], eta[head])
        if tier is None:
            continue
        severity, name, value, why = tier
        place = heads.places[head]
        evidence = (
            f"{_head(place)}: largest |score| {_peak(stats, size[head])} at step {history[-1].step}, {why}"
            f"{_pace(heads, head)}{_naive(stats, size[head])}"
            f"{_rounding(bounds[head], bits[head], usual[head])}"
        )
        suggestion = CLIP_AND_SLOW if severity == "error" else f"{CLIP} if it keeps rising"
        yield _issue("overflow_risk", severity, place, value, name, evidence, suggestion)


def _overflow_tier(
    stats: HeadStats, size: float, watched: int, projected: float, eta: float
) -> tuple[str, str, float, str] | None:
    """The worst limit that a head breaks: (severity, threshold, value, why)."""
    product = size * stats.head_dim**0.5
    if stats.dtype == "float16" and product > threshold("fp16_product"):
        why = f"so q.k before scaling reaches {product:.4g}: infinite where the product is stored in fp16"
        return "error", "fp16_product", product, why
    if size > threshold("diverged_logit"):
        return "error", "diverged_logit", size, "beyond where published runs diverged"
    if size > threshold("deteriorating_logit"):
        return "error", "deteriorating_logit", size, "beyond where published runs deteriorated"
    if projected > threshold("alarm_logit"):
        when = f"in about {eta:.0f} steps" if np.isfinite(eta) else "now"
        why = f"on a line that passes {threshold('alarm_logit'):.0f} {when}"
        return "error", "alarm_logit", projected, why
    if size > threshold("clip_logit"):
        return "warning", "clip_logit", size, "beyond where Kimi K2 clips (healthy runs pass it early on)"
    if watched >= threshold("watch_snapshots"):
        why = f"above {threshold('watch_logit'):.0f} for {watched} snapshots in a row"
        return "warning", "watch_logit", size, why
    return None


def entropy_collapse(history: Sequence[Snapshot], heads: Heads) -> Iterator[StabilityIssue]:
    """Heads whose rows attend to next to nothing, and heads on their way there.

    Sink heads are sharp by design and left out, unless their scores are large too. One sharp head
    is a warning; it is an error with large or rising scores, or when half of its layer is the same.
    """
    ratio, dead = heads.stats.normalized_entropy, heads.stats.saturated_share
    judged = ~_sink_by_design(heads)
    low = judged & ((ratio < threshold("low_ratio")) | (dead > threshold("many_saturated_rows")))
    if low.any():
        collapsed = judged & ((ratio < threshold("collapse_ratio")) | (dead > threshold("saturated_rows")))
        yield from _sharp(history[-1].step, heads, low, collapsed)
    yield from _forecasts(history[-1].step, heads, judged & ~low)


def _sharp(step: int, heads: Heads, low: np.ndarray, collapsed: np.ndarray) -> Iterator[StabilityIssue]:
    """Heads whose entropy is low, some of which have collapsed."""
    stats = heads.stats
    ratio, stderr, tenth = (
        stats.normalized_entropy,
        stats.normalized_entropy_stderr,
        stats.normalized_entropy_p10,
    )
    dead, sink = stats.saturated_share, stats.sink_mass
    real = collapsed & _corroborated(heads, collapsed)
    alike = np.where(collapsed, heads.in_layer(collapsed), heads.in_layer(low))
    for head in np.flatnonzero(low):
        place = heads.places[head]
        name, value = _sharpness(ratio[head], dead[head], collapsed[head])
        evidence = (
            f"{_head(place)}: normalized entropy {ratio[head]:.3f}{_error(stderr[head])} (10th percentile "
            f"{tenth[head]:.3f}, {dead[head]:.0%} saturated rows) at step {step}, like {alike[head]:.0f} "
            f"of the layer's {heads.layer_heads[head]} heads, with scores up to {_peak(stats, heads.score[head])}"
            f"{' and rising' if heads.rising[head] else ''}{_sink_note(sink[head])}"
        )
        if real[head]:
            severity = "error"
            suggestion = f"{CLIP}, or raise this head's attention temperature (get_intervention proposes one)"
        else:
            severity = "warning"
            suggestion = "watch it; if more heads follow, raise the layer's attention temperature"
        yield _issue("entropy_collapse", severity, place, value, name, evidence, suggestion)


def _sharpness(ratio: float, dead: float, collapsed: bool) -> tuple[str, float]:
    """The threshold that a sharp head breaks, and the value that breaks it."""
    by_ratio, by_dead = (
        ("collapse_ratio", "saturated_rows") if collapsed else ("low_ratio", "many_saturated_rows")
    )
    return (by_ratio, ratio) if ratio < threshold(by_ratio) else (by_dead, dead)


def _forecasts(step: int, heads: Heads, judged: np.ndarray) -> Iterator[StabilityIssue]:
    """Heads whose normalized entropy falls towards collapse while their scores rise to the watch level.

    Falling entropy alone is what learning looks like; with growing scores it is the instability.
    """
    ratio = heads.stats.normalized_entropy
    candidates = judged & heads.rising & (ratio < threshold("forecast_ratio"))
    if not candidates.any():
        return
    line, stderr = heads.normalized_entropy, heads.stats.normalized_entropy_stderr
    eta = line.steps_until(threshold("collapse_ratio"))
    horizon = np.minimum(threshold("collapse_horizon"), threshold("forecast_reach") * line.span)
    falling = (line.slope < 0) & (eta <= horizon)
    large_by_then = heads.score_ahead(eta) > threshold("watch_logit")
    for head in np.flatnonzero(candidates & falling & large_by_then):
        place, value = heads.places[head], ratio[head]
        evidence = (
            f"{_head(place)}: will collapse in about {eta[head]:.0f} steps: normalized entropy "
            f"{value:.3f}{_error(stderr[head])} at step {step} falls by "
            f"{-100 * line.slope[head]:.2g} per 100 steps, while the largest |score| "
            f"({_peak(heads.stats, heads.score[head])}) rises"
        )
        yield _issue("entropy_collapse", "warning", place, value, "collapse_ratio", evidence, CLIP_AND_SLOW)


def one_hot_attention(history: Sequence[Snapshot], heads: Heads) -> Iterator[StabilityIssue]:
    """Heads that put nearly all weight on one key in the mean row, sinks aside."""
    stats = heads.stats
    weight = stats.max_weight
    spiked = ~_sink_by_design(heads) & (weight > threshold("one_hot_weight"))
    if not spiked.any():
        return
    stderr, sink = stats.max_weight_stderr, stats.sink_mass
    for head in np.flatnonzero(spiked):
        place, value = heads.places[head], weight[head]
        evidence = (
            f"{_head(place)}: the largest weight of a row is {value:.3f}{_error(stderr[head])} "
            f"in the mean at step {history[-1].step}, with {sink[head]:.2f} on the first key"
        )
        suggestion = (
            "raise the layer's attention dropout if most of its heads do this; one such head may be meant"
        )
        yield _issue("one_hot_attention", "warning", place, value, "one_hot_weight", evidence, suggestion)


def vanishing_gradient(history: Sequence[Snapshot], heads: Heads) -> Iterator[StabilityIssue]:
    """Heads whose softmax lets almost no gradient through to queries and keys."""
    share = heads.stats.jacobian_trace_bound
    weak = ~_sink_by_design(heads) & (share < threshold("gradient_share"))
    if not weak.any():
        return
    lost = weak & (share < threshold("gradient_lost"))
    real = lost & _corroborated(heads, lost)
    stderr = heads.stats.jacobian_trace_bound_stderr
    for head in np.flatnonzero(weak):
        place, value = heads.places[head], share[head]
        severity, name = ("error", "gradient_lost") if real[head] else ("warning", "gradient_share")
        evidence = (
            f"{_head(place)}: at most {value:.2g}{_error(stderr[head])} of the softmax gradient gets through "
            f"(trace of its Jacobian, mean of rows) at step {history[-1].step}"
        )
        suggestion = (
            "little gradient reaches its query and key weights on such rows; a trained head may be meant "
            "to be this sharp, else raise its attention temperature"
        )
        yield _issue("vanishing_gradient", severity, place, value, name, evidence, suggestion)


RULES = (non_finite, overflow_risk, entropy_collapse, vanishing_gradient, one_hot_attention)


def _issue(
    issue_type: str,
    severity: str,
    place: tuple[str, int],
    value: float,
    name: str,
    evidence: str,
    suggestion: str,
) -> StabilityIssue:
    entry = THRESHOLDS[name]
    return StabilityIssue(
        *place, issue_type, severity, float(value), entry.value, entry.source, evidence, suggestion
    )


def _head(place: tuple[str, int]) -> str:
    layer, number = place
    return f"head {number} of {display_name(layer)}"


def _peak(stats: HeadStats, number: float) -> str:
    """A maximum over rows; over a sample of them it is a lower bound."""
    return f"at least {number:.4g}" if stats.sampled else f"{number:.4g}"


def _error(stderr: float) -> str:
    """The standard error of a mean of sampled rows; nothing where all were measured."""
    return f" ± {stderr:.1g}" if stderr > 0 else ""


def _origin(history: Sequence[Snapshot]) -> tuple[int, str]:
    """Step and layer at which the present run of snapshots with non-finite rows began."""
    step, origin = history[-1].step, ""
    for snapshot in reversed(history):
        bad = (layer for layer, stats in snapshot.layers.items() if stats.nonfinite_rows.any())
        first = next(bad, None)
        if first is None:
            break
        step, origin = snapshot.step, first
    return step, origin


def _sink_by_design(heads: Heads) -> np.ndarray:
    """Heads that rest on the first key, with scores that say nothing else."""
    return (heads.stats.sink_mass > threshold("sink_mass")) & ~_grown(heads)


def _sink_note(sink: float) -> str:
    large = sink > threshold("sink_mass")
    return f"; a sink head ({sink:.2f} on the first key) with large scores" if large else ""


def _grown(heads: Heads) -> np.ndarray:
    """Heads whose scores say instability rather than specialisation."""
    return (heads.score > threshold("clip_logit")) | (heads.rising & (heads.score > threshold("watch_logit")))


def _corroborated(heads: Heads, suspects: np.ndarray) -> np.ndarray:
    """Which of the suspect heads are more than one trained sharp head in a healthy layer."""
    return _grown(heads) | (heads.in_layer(suspects) / heads.layer_heads >= threshold("layer_share"))


def _pace(heads: Heads, head: int) -> str:
    if not heads.rising[head]:
        return ""
    return f"; its sqrt grows by {100 * heads.root_score.slope[head]:.2g} per 100 steps"


def _rounding(bound: float, bits: float, usual: float) -> str:
    """What a head's scores cost in precision, where that is known: `error_bound`, `required_` and `typical_bits`."""
    if not np.isfinite(bound + bits):
        return ""
    return (
        f"; rounding costs up to {bound:.2g} of the largest |v|, q and k need {usual:.0f} to {bits:.0f} bits"
    )


def _naive(stats: HeadStats, size: float) -> str:
    limit = threshold("naive_exp_float16" if stats.dtype == "float16" else "naive_exp")
    if size <= limit:
        return ""
    return f"; exp overflows past {limit} without max subtraction"
