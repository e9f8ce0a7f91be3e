"""The rules: each reads the history of head statistics and returns findings about the latest reading."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ..names import shown
from ..stats import HeadStats, Snapshot
from .findings import StabilityIssue
from .thresholds import THRESHOLDS, threshold
from .trends import Trend, readings_above

Trends = Mapping[str, Trend]  # of every layer of the latest snapshot

CLIP = "apply QK-clip at 30 after the optimizer step"
CLIP_AND_SLOW = (
    f"{CLIP} and halve the learning rate (get_intervention proposes both); QK-norm is the lasting fix"
)


def non_finite(history: Sequence[Snapshot], trends: Trends) -> list[StabilityIssue]:
    """Rows that NaN or inf reached. The first layer to show them, in execution order, is the origin."""
    latest = history[-1]
    step, origin = _origin(history)
    issues = []
    for layer, stats in latest.layers.items():
        bad, total = stats.nonfinite_rows, stats.rows + stats.nonfinite_rows
        for head in np.flatnonzero(bad):
            share = bad[head] / total[head]
            where = "this layer is" if layer == origin else f"layer {shown(origin)} was"
            evidence = (
                f"{_head(layer, head)}: {bad[head]:.0f} of {total[head]:.0f} rows ({share:.1%}) are not "
                f"finite at step {latest.step}; {where} the first to show it, at step {step}"
            )
            suggestion = (
                "restore the last checkpoint with finite weights, then lower the learning rate; "
                f"look for the overflow in {shown(origin)} and what feeds it"
            )
            issues.append(
                _issue("non_finite", "error", layer, head, share, "nonfinite_rows", evidence, suggestion)
            )
    return issues


def overflow_risk(history: Sequence[Snapshot], trends: Trends) -> list[StabilityIssue]:
    """Scores that are, or soon will be, too large: published growth limits, fp16 range, own alarm."""
    latest = history[-1]
    issues = []
    for layer, stats in latest.layers.items():
        lines = trends[layer]
        size = lines.score
        sustained = readings_above(history, layer, threshold("watch_logit"))
        projected = lines.score_ahead(threshold("alarm_horizon"))
        suspicious = (size > threshold("watch_logit")) | (projected > threshold("alarm_logit"))
        rounding = _rounding(stats) if suspicious.any() else []
        for head in np.flatnonzero(suspicious):
            tier = _overflow_tier(stats, head, size[head], sustained[head], projected[head], lines)
            if tier is None:
                continue
            severity, name, value, why = tier
            evidence = (
                f"{_head(layer, head)}: largest |score| {_peak(stats, size[head])} at step {latest.step}, {why}"
                f"{_pace(lines, head)}{_naive(stats, size[head])}{rounding[head]}"
            )
            suggestion = CLIP_AND_SLOW if severity == "error" else f"{CLIP} if it keeps rising"
            issues.append(_issue("overflow_risk", severity, layer, head, value, name, evidence, suggestion))
    return issues


def _overflow_tier(
    stats: HeadStats, head: int, size: float, sustained: int, projected: float, lines: Trend
) -> tuple[str, str, float, str] | None:
    """The worst limit that this head breaks: (severity, threshold, value, why)."""
    product = size * stats.head_dim**0.5
    if stats.dtype == "float16" and product > threshold("fp16_product"):
        why = f"so q.k before scaling reaches {product:.4g}: infinite where the product is stored in fp16"
        return "error", "fp16_product", product, why
    if size > threshold("diverged_logit"):
        return "error", "diverged_logit", size, "beyond where published runs diverged"
    if size > threshold("deteriorating_logit"):
        return "error", "deteriorating_logit", size, "beyond where published runs deteriorated"
    if projected > threshold("alarm_logit"):
        eta = lines.steps_until_score(threshold("alarm_logit"))[head]
        when = f"in about {eta:.0f} steps" if np.isfinite(eta) else "now"
        why = f"on a line that passes {threshold('alarm_logit'):.0f} {when}"
        return "error", "alarm_logit", projected, why
    if size > threshold("clip_logit"):
        return "warning", "clip_logit", size, "beyond where Kimi K2 clips (healthy runs pass it early on)"
    if sustained >= threshold("watch_readings"):
        why = f"above {threshold('watch_logit'):.0f} for {sustained} readings in a row"
        return "warning", "watch_logit", size, why
    return None


def entropy_collapse(history: Sequence[Snapshot], trends: Trends) -> list[StabilityIssue]:
    """Heads whose rows attend to next to nothing, and heads on their way there.

    Sink heads are sharp by design and left out, unless their scores are large too. One sharp head
    is a warning; it is an error with large or rising scores, or when half of its layer is the same.
    """
    latest = history[-1]
    issues = []
    for layer, stats in latest.layers.items():
        lines = trends[layer]
        ratio, dead, size = stats.entropy_ratio, stats.dead_share, lines.score
        judged = ~_sink_by_design(stats, lines)
        collapsed = judged & ((ratio < threshold("collapse_ratio")) | (dead > threshold("dead_rows")))
        low = judged & ((ratio < threshold("low_ratio")) | (dead > threshold("many_dead_rows")))
        real = collapsed & _corroborated(lines, collapsed)
        for head in np.flatnonzero(low):
            name, value = _sharpness(ratio[head], dead[head], bool(collapsed[head]))
            alike = collapsed if collapsed[head] else low
            evidence = (
                f"{_head(layer, head)}: entropy ratio "
                f"{ratio[head]:.3f}{_error(stats.entropy_ratio_stderr[head])} (10th percentile "
                f"{stats.entropy_ratio_p10[head]:.3f}, {dead[head]:.0%} dead rows) at step {latest.step}, "
                f"like {alike.sum()} of the layer's {len(alike)} heads, with scores up to {_peak(stats, size[head])}"
                f"{' and rising' if lines.rising[head] else ''}{_sink_note(stats, head)}"
            )
            if real[head]:
                severity = "error"
                suggestion = (
                    f"{CLIP}, or raise this head's attention temperature (get_intervention proposes one)"
                )
            else:
                severity = "warning"
                suggestion = "watch it; if more heads follow, raise the layer's attention temperature"
            issues.append(
                _issue("entropy_collapse", severity, layer, head, value, name, evidence, suggestion)
            )
        issues += _forecasts(latest, layer, stats, lines, judged & ~low)
    return issues


def _sharpness(ratio: float, dead: float, collapsed: bool) -> tuple[str, float]:
    """The threshold that a sharp head breaks, and the value that breaks it."""
    by_ratio, by_dead = ("collapse_ratio", "dead_rows") if collapsed else ("low_ratio", "many_dead_rows")
    return (by_ratio, ratio) if ratio < threshold(by_ratio) else (by_dead, dead)


def _forecasts(
    latest: Snapshot, layer: str, stats: HeadStats, lines: Trend, judged: np.ndarray
) -> Iterator[StabilityIssue]:
    """Heads whose entropy ratio falls towards collapse while their scores rise to the watch level.

    Falling entropy alone is what learning looks like; with growing scores it is the instability.
    """
    line = lines.entropy_ratio
    eta = line.steps_until(threshold("collapse_ratio"))
    horizon = np.minimum(threshold("collapse_horizon"), threshold("forecast_reach") * line.span)
    falling = (line.slope < 0) & (eta <= horizon) & (stats.entropy_ratio < threshold("forecast_ratio"))
    large_by_then = lines.rising & (lines.score_ahead(eta) > threshold("watch_logit"))
    for head in np.flatnonzero(judged & falling & large_by_then):
        evidence = (
            f"{_head(layer, head)}: will collapse in about {eta[head]:.0f} steps: entropy ratio "
            f"{stats.entropy_ratio[head]:.3f}{_error(stats.entropy_ratio_stderr[head])} at step {latest.step} falls by "
            f"{-100 * line.slope[head]:.2g} per 100 steps, while the largest |score| "
            f"({_peak(stats, lines.score[head])}) rises"
        )
        value = stats.entropy_ratio[head]
        yield _issue(
            "entropy_collapse", "warning", layer, head, value, "collapse_ratio", evidence, CLIP_AND_SLOW
        )


def attention_spike(history: Sequence[Snapshot], trends: Trends) -> list[StabilityIssue]:
    """Heads that put nearly all weight on one key in the mean row, sinks aside."""
    latest = history[-1]
    issues = []
    for layer, stats in latest.layers.items():
        sinks = _sink_by_design(stats, trends[layer])
        spiked = ~sinks & (stats.max_weight > threshold("spike_weight"))
        for head in np.flatnonzero(spiked):
            value = stats.max_weight[head]
            evidence = (
                f"{_head(layer, head)}: the largest weight of a row is {value:.3f}"
                f"{_error(stats.max_weight_stderr[head])} in the mean at step {latest.step}, "
                f"with {stats.sink_mass[head]:.2f} on the first key"
            )
            suggestion = (
                "raise the layer's attention dropout if most of its heads do this; one such head may be meant"
            )
            issues.append(
                _issue("attention_spike", "warning", layer, head, value, "spike_weight", evidence, suggestion)
            )
    return issues


def vanishing_gradient(history: Sequence[Snapshot], trends: Trends) -> list[StabilityIssue]:
    """Heads whose softmax lets almost no gradient through to queries and keys."""
    latest = history[-1]
    issues = []
    for layer, stats in latest.layers.items():
        share = stats.jacobian_trace_bound
        lines = trends[layer]
        judged = ~_sink_by_design(stats, lines)
        weak, lost = (
            judged & (share < threshold("gradient_share")),
            judged & (share < threshold("gradient_lost")),
        )
        real = lost & _corroborated(lines, lost)
        for head in np.flatnonzero(weak):
            severity, name = ("error", "gradient_lost") if real[head] else ("warning", "gradient_share")
            evidence = (
                f"{_head(layer, head)}: at most {share[head]:.2g}"
                f"{_error(stats.jacobian_trace_bound_stderr[head])} of the softmax gradient gets through "
                f"(trace of its Jacobian, mean of rows) at step {latest.step}"
            )
            suggestion = (
                "little gradient reaches its query and key weights on such rows; a trained head may be meant "
                "to be this sharp, else raise its attention temperature"
            )
            issues.append(
                _issue("vanishing_gradient", severity, layer, head, share[head], name, evidence, suggestion)
            )
    return issues


RULES = (non_finite, overflow_risk, entropy_collapse, vanishing_gradient, attention_spike)


def _issue(
    issue_type: str,
    severity: str,
    layer: str,
    head: int,
    value: float,
    name: str,
    evidence: str,
    suggestion: str,
) -> StabilityIssue:
    entry = THRESHOLDS[name]
    head, value = int(head), float(value)
    return StabilityIssue(
        layer, head, issue_type, severity, value, entry.value, entry.source, evidence, suggestion
    )


def _head(layer: str, head: int) -> str:
    return f"head {head} of {shown(layer)}"


def _peak(stats: HeadStats, number: float) -> str:
    """A maximum over rows; over a sample of them it is a lower bound."""
    return f"at least {number:.4g}" if stats.sampled else f"{number:.4g}"


def _error(stderr: float) -> str:
    """The standard error of a mean of sampled rows; nothing where all were measured."""
    return f" ± {stderr:.1g}" if stderr > 0 else ""


def _origin(history: Sequence[Snapshot]) -> tuple[int, str]:
    """Step and layer at which the present run of readings with non-finite rows began."""
    step, origin = history[-1].step, ""
    for snapshot in reversed(history):
        bad = [layer for layer, stats in snapshot.layers.items() if stats.nonfinite_rows.any()]
        if not bad:
            break
        step, origin = snapshot.step, bad[0]
    return step, origin


def _sink_by_design(stats: HeadStats, lines: Trend) -> np.ndarray:
    """Heads that rest on the first key, with scores that say nothing else."""
    return (stats.sink_mass > threshold("sink_mass")) & ~_grown(lines)


def _sink_note(stats: HeadStats, head: int) -> str:
    sink = stats.sink_mass[head]
    return (
        f"; a sink head ({sink:.2f} on the first key) with large scores"
        if sink > threshold("sink_mass")
        else ""
    )


def _grown(lines: Trend) -> np.ndarray:
    """Heads whose scores say instability rather than specialisation."""
    return (lines.score > threshold("clip_logit")) | (lines.rising & (lines.score > threshold("watch_logit")))


def _corroborated(lines: Trend, suspects: np.ndarray) -> np.ndarray:
    """Which of the suspect heads are more than one trained sharp head in a healthy layer."""
    return _grown(lines) | (suspects.mean() >= threshold("layer_share"))


def _pace(lines: Trend, head: int) -> str:
    slope = lines.root_score.slope[head]
    if not lines.rising[head]:
        return ""
    return f"; its sqrt grows by {100 * slope:.2g} per 100 steps"


def _rounding(stats: HeadStats) -> list[str]:
    """What each head's scores cost in precision, where that is known: `error_bound`, `typical_` and `required_bits`."""
    numbers = zip(stats.error_bound, stats.required_bits, stats.typical_bits, strict=True)
    return [
        f"; rounding costs up to {bound:.2g} of the largest |v|, q and k need {usual:.0f} to {bits:.0f} bits"
        if np.isfinite(bound + bits)
        else ""
        for bound, bits, usual in numbers
    ]


def _naive(stats: HeadStats, size: float) -> str:
    limit = threshold("naive_exp_float16" if stats.dtype == "float16" else "naive_exp")
    if size <= limit:
        return ""
    return f"; exp overflows past {limit} without max subtraction"
