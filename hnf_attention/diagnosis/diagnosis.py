"""A diagnosis: the issues at one step, and the numbers behind them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..names import display_name
from ..statistics.heads import HeadStats, Snapshot
from .extent import Extent, counted, extent
from .issue import StabilityIssue, grouped, heads_text
from .plots import Plots

#: What `to_dict` holds of each layer: one number per head.
HEAD_FIELDS = (
    "rows",
    "judged_rows",
    "left_out_rows",
    "empty_rows",
    "nonfinite_rows",
    "nonfinite_query",
    "nonfinite_key",
    "nonfinite_value",
    "nonfinite_out",
    "nonfinite_empty",
    "entropy",
    "normalized_entropy",
    "normalized_entropy_min",
    "normalized_entropy_p10",
    "saturated_share",
    "stray_share",
    "max_weight",
    "sink_mass",
    "rest_normalized_entropy",
    "jacobian_trace_bound",
    "normalized_entropy_stderr",
    "saturated_share_stderr",
    "max_weight_stderr",
    "sink_mass_stderr",
    "jacobian_trace_bound_stderr",
    "logit_range",
    "logit_range_max",
    "max_logit",
    "min_logit",
    "query_norm",
    "key_norm",
    "log2_curvature",
    "score_magnitude",
    "error_bound",
    "required_bits",
    "typical_bits",
)
_LAYER_FIELDS = ("num_heads", "head_dim", "dtype", "sample_period")


@dataclass(repr=False)
class AttentionDiagnosis(Plots):
    """The issues at one step, worst first, with the numbers that they came from.

    stats: the latest snapshot, layer name to head statistics. history: the snapshots that the rules saw,
    oldest first; `stats` is the last of them. not_measured: attention that was seen and not measured,
    layer name to reason. thresholds: those that were judged with in place of the table's. not_judged: rules
    that failed, by name, and why; their issues are not known.
    """

    issues: list[StabilityIssue]
    stats: dict[str, HeadStats]
    step: int = 0
    history: Sequence[Snapshot] = ()
    not_measured: dict[str, str] = field(default_factory=dict)
    thresholds: Mapping[str, float] = field(default_factory=dict)
    not_judged: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        kinds = Counter(f"{issue.severity}: {issue.issue_type}" for issue in self.issues)
        found = ", ".join(f"{kind} ({count})" for kind, count in kinds.items()) or "no issues"
        missed = f", {len(self.not_measured)} layers not measured" if self.not_measured else ""
        return (
            f"AttentionDiagnosis of step {self.step}: {len(self.stats)} layers, {self._num_heads} heads{missed}; "
            f"{found}; history of {len(self.history)} snapshots"
        )

    def has_issues(self) -> bool:
        """Whether there is any error or warning. Notes are no reason for alarm."""
        return any(issue.severity != "note" for issue in self.issues)

    @property
    def errors(self) -> list[StabilityIssue]:
        """Issues of severity "error", worst first."""
        return self._of("error")

    @property
    def warnings(self) -> list[StabilityIssue]:
        """Issues of severity "warning"."""
        return self._of("warning")

    @property
    def notes(self) -> list[StabilityIssue]:
        """Issues of severity "note": worth saying, and no reason for alarm."""
        return self._of("note")

    def _of(self, severity: str) -> list[StabilityIssue]:
        return [issue for issue in self.issues if issue.severity == severity]

    @property
    def extent(self) -> Extent:
        """How many layers, heads and rows were measured and judged; its text is how `summary` begins."""
        return extent(self.stats)

    @property
    def healthy(self) -> bool | None:
        """False for an error; True if there is none and every head was measured and judged; None for neither."""
        if self.errors:
            return False
        seen = self.extent
        whole = seen.judged == seen.heads and not self.not_measured and not self.not_judged
        return True if whole else None

    @property
    def verdict(self) -> str:
        """`healthy` in words; with a warning, no more is said than that there is no error."""
        words = {
            True: "no error" if self.warnings else "healthy",
            False: "not healthy",
            None: "no error, but not everything was judged",
        }
        return words[self.healthy]

    @property
    def holds(self) -> str | None:
        """Which forward passes were measured and which were left out, as text; None if they were not counted."""
        counted = bool(self.history) and any(self.history[-1].forwards)
        return self.history[-1].holds if counted else None

    def to_dict(self) -> dict[str, Any]:
        """Everything but the history as JSON types: arrays are lists; NaN and infinities are None."""
        return {
            "step": self.step,
            "healthy": self.healthy,
            "holds": self.holds,
            "issues": [_issue_dict(issue, self._trains) for issue in self.issues],
            "layers": {name: _jsonable(_layer_dict(stats)) for name, stats in self.stats.items()},
            "not_measured": dict(self.not_measured),
            "not_judged": dict(self.not_judged),
        }

    def summary(self) -> str:
        """The issues as text for people: one entry for each layer and type, with its worst head's evidence."""
        found = [counted(len(self.errors), "error"), counted(len(self.warnings), "warning")]
        if self.notes:
            found.append(counted(len(self.notes), "note"))
        lines = [f"step {self.step}: {self.extent}; {', '.join(found)}: {self.verdict}"]
        if self.holds is not None:
            lines.append(f"measured in {self.holds}")
        for group in grouped(self.issues):
            worst = group[0]
            lines.append(
                f"{worst.severity}: {worst.issue_type} in {display_name(worst.layer)}{heads_text(group)}"
            )
            lines.append(f"    {worst.evidence}")
            if worst.measured and self._trains:
                lines.append(f"    {worst.measured}")
            lines.append(f"    -> {worst.suggestion}")
        if self.not_measured:
            lines.append("not measured:")
            lines += [f"    {display_name(name)}: {why}" for name, why in self.not_measured.items()]
        if self.not_judged:
            lines.append("not judged:")
            lines += [f"    {name}: {why}" for name, why in self.not_judged.items()]
        return "\n".join(lines)

    @property
    def _trains(self) -> bool:
        """Whether the model is in training: of finished models the laboratory counted nothing."""
        return bool(self.history) and self.history[-1].training

    @property
    def _num_heads(self) -> int:
        return sum(stats.num_heads for stats in self.stats.values())

    def _snapshots(self) -> list[Snapshot]:
        return list(self.history) or [Snapshot(self.step, self.stats)]


def _layer_dict(stats: HeadStats) -> dict[str, Any]:
    return {name: getattr(stats, name) for name in (*_LAYER_FIELDS, *HEAD_FIELDS)}


def _issue_dict(issue: StabilityIssue, trains: bool) -> dict[str, Any]:
    measured = issue.measured or None
    items = asdict(issue) | {"headline": issue.headline, "measured": measured if trains else None}
    del items["brief"]  # the headline holds it
    return _jsonable(items)


def _jsonable(items: dict[str, Any]) -> dict[str, Any]:
    return {name: _jsonable_value(value) for name, value in items.items()}


def _jsonable_value(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [_jsonable_value(item) for item in value.tolist()]
    return None if isinstance(value, float) and not math.isfinite(value) else value
