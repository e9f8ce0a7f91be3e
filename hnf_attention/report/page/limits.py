"""The thresholds that a chart of a statistic shows, and which end of its scale is the bad one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...diagnosis.thresholds import THRESHOLDS
from ...run_log.metrics import METRICS

#: Statistic to (threshold, what it is multiplied with, short name): scores are judged by half of a row's range.
_LIMITS: dict[str, tuple[tuple[str, float, str], ...]] = {
    "logit_range_max": (
        ("watch_logit", 2.0, "watch"),
        ("alarm_logit", 2.0, "alarm"),
        ("deteriorating_logit", 2.0, "loss suffers"),
        ("diverged_logit", 2.0, "diverges"),
    ),
    "normalized_entropy": (
        ("low_entropy", 1.0, "low"),
        ("collapsed_entropy", 1.0, "collapsed"),
    ),
    "normalized_entropy_p10": (("low_tenth", 1.0, "low"),),
    "max_weight": (("one_hot_weight", 1.0, "one-hot"),),
    "sink_mass": (("sink_mass", 1.0, "sink"), ("dormant_sink", 1.0, "dormant")),
    "saturated_share": (("high_saturation", 1.0, "high"), ("collapsed_saturation", 1.0, "collapsed")),
    "jacobian_trace_bound": (("weak_gradient", 1.0, "weak"), ("lost_gradient", 1.0, "lost")),
}
_LOW_IS_BAD = {metric.name for metric in METRICS if metric.low_is_bad}
#: Statistic that shows an issue of a type best.
SHOWS = {
    "overflow_risk": "logit_range_max",
    "entropy_collapse": "normalized_entropy",
    "vanishing_gradient": "jacobian_trace_bound",
    "one_hot_attention": "max_weight",
    "dormant_attention": "sink_mass",
}


def limits(metric: str, own: Sequence[tuple[str, Mapping[str, float]]] = (("", {}),)) -> list[dict[str, Any]]:
    """The lines of a chart: value, name, source.

    own: of each run its name, and the thresholds that it was judged with in place of the table's; where they changed
    during the run, the latest. A line that differs between the runs is drawn for each, with the run's name.
    """
    found = []
    for name, factor, short in _LIMITS.get(metric, ()):
        entry = THRESHOLDS[name]
        values = [thresholds.get(name, entry.value) for _, thresholds in own]
        same = len(set(values)) == 1
        for (run, _), value in list(zip(own, values))[: 1 if same else None]:
            if not math.isfinite(value * factor):  # a number as large as that turns a rule off
                continue
            source = entry.source
            if value != entry.value:
                source = f"set by this run: {name} {value:g}" + (" to either side" if factor == 2.0 else "")
            label = short if same else f"{short}, {run}"
            found.append({"value": value * factor, "name": label, "source": source})
    return found


def worse(metric: str) -> str:
    """'low' or 'high': the end of the scale that is bad."""
    return "low" if metric in _LOW_IS_BAD else "high"
