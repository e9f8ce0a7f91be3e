"""What a diagnosis consists of: one issue, and the whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from ..names import display_name
from ..statistics.heads import HeadStats, Snapshot
from .thresholds import threshold

if TYPE_CHECKING:
    from os import PathLike

    from matplotlib.figure import Figure

SEVERITIES = ("error", "warning")  # worst first
ISSUE_TYPES = ("non_finite", "overflow_risk", "entropy_collapse", "vanishing_gradient", "one_hot_attention")
# Names of version 0.1, as old logs and scripts have them.
_RENAMED_TYPES = {"attention_spike": "one_hot_attention"}
HEAD_FIELDS = (
    "rows",
    "judged_rows",
    "nonfinite_rows",
    "entropy",
    "normalized_entropy",
    "normalized_entropy_min",
    "normalized_entropy_p10",
    "saturated_share",
    "max_weight",
    "sink_mass",
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


@dataclass(frozen=True)
class StabilityIssue:
    """One diagnosed problem: where, what, how bad, why that is a problem, and what to do.

    head is None when the issue is about the whole layer. `value` is compared with `threshold`,
    whose origin is `source`; `evidence` is a sentence with the numbers and the step.
    """

    layer: str
    head: int | None
    issue_type: str
    severity: str
    value: float
    threshold: float
    source: str
    evidence: str
    suggestion: str

    def __post_init__(self):
        object.__setattr__(self, "issue_type", _RENAMED_TYPES.get(self.issue_type, self.issue_type))


@dataclass
class AttentionDiagnosis:
    """The issues at one step, worst first, with the numbers they came from.

    stats: the latest snapshot, layer name to head statistics. history: the snapshots the rules saw,
    oldest first, of which `stats` is the last. not_measured: attention that was seen but not
    measured, layer name to reason.
    """

    issues: list[StabilityIssue]
    stats: dict[str, HeadStats]
    step: int = 0
    history: Sequence[Snapshot] = ()
    not_measured: dict[str, str] = field(default_factory=dict)

    def has_issues(self) -> bool:
        return bool(self.issues)

    @property
    def errors(self) -> list[StabilityIssue]:
        return [issue for issue in self.issues if issue.severity == "error"]

    @property
    def warnings(self) -> list[StabilityIssue]:
        return [issue for issue in self.issues if issue.severity == "warning"]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the history as JSON types: arrays are lists, NaN and infinities None."""
        return _jsonable(
            {
                "step": self.step,
                "healthy": not self.errors,
                "issues": [asdict(issue) for issue in self.issues],
                "layers": {name: _layer_dict(stats) for name, stats in self.stats.items()},
                "not_measured": dict(self.not_measured),
            }
        )

    def summary(self) -> str:
        """The issues as text for people: grouped by layer and kind, the worst head speaks for its group."""
        heads = sum(stats.num_heads for stats in self.stats.values())
        measured = f"step {self.step}: {len(self.stats)} layers, {heads} heads measured"
        lines = [f"{measured}; {len(self.errors)} errors, {len(self.warnings)} warnings"]
        for group in grouped(self.issues):
            worst = group[0]
            lines.append(
                f"{worst.severity}: {worst.issue_type} in {display_name(worst.layer)}{heads_text(group)}"
            )
            lines.append(f"    {worst.evidence}")
            lines.append(f"    -> {worst.suggestion}")
        if self.not_measured:
            lines.append("not measured:")
            lines += [f"    {display_name(name)}: {why}" for name, why in self.not_measured.items()]
        return "\n".join(lines)

    def plot_entropy_heatmap(self, path: str | PathLike[str] | None = None) -> Figure:
        """Normalized entropy of every head of every layer at the latest snapshot; saved to `path` if given."""
        from .. import figures

        return _saved(figures.entropy_heatmap(self._snapshots()[-1], threshold("sink_mass")), path)

    def plot_curvature_evolution(self, path: str | PathLike[str] | None = None) -> Figure:
        """log2 of the HNF curvature bound over the snapshots, per layer; saved to `path` if given.

        Of a single snapshot, as an analyzer takes, every head's is drawn.
        """
        from .. import figures

        return _saved(figures.curvature_evolution(self._snapshots()), path)

    def _snapshots(self) -> list[Snapshot]:
        return list(self.history) or [Snapshot(self.step, self.stats)]


def grouped(issues: Sequence[StabilityIssue]) -> list[list[StabilityIssue]]:
    """Issues of one severity, kind and layer together, in their order; the worst of each group first."""

    def kind(issue: StabilityIssue) -> tuple[str, str, str]:
        return issue.severity, issue.issue_type, issue.layer

    groups = [list(group) for _, group in groupby(sorted(issues, key=kind), key=kind)]
    groups = [sorted(group, key=_excess, reverse=True) for group in groups]
    order = {kind(issue): position for position, issue in reversed(list(enumerate(issues)))}
    return sorted(groups, key=lambda group: order[kind(group[0])])


def heads_text(group: Sequence[StabilityIssue]) -> str:
    """' head 3', ' heads 0-3, 7', or nothing when the issue is about the layer."""
    heads = sorted(issue.head for issue in group if issue.head is not None)
    if not heads:
        return ""
    runs: list[list[int]] = []
    for head in heads:
        if runs and head == runs[-1][-1] + 1:
            runs[-1].append(head)
        else:
            runs.append([head])
    names = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f" head{'s' if len(heads) > 1 else ''} {names}"


def _excess(issue: StabilityIssue) -> float:
    """How far beyond its threshold an issue is: comparable within one kind."""
    if issue.issue_type in ("entropy_collapse", "vanishing_gradient"):  # small is bad
        return issue.threshold - issue.value
    return issue.value - issue.threshold


def _layer_dict(stats: HeadStats) -> dict[str, Any]:
    numbers = {name: getattr(stats, name) for name in HEAD_FIELDS}
    described = {name: getattr(stats, name) for name in ("num_heads", "head_dim", "dtype", "sample_period")}
    return described | numbers


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _saved(figure: Figure, path: str | PathLike[str] | None) -> Figure:
    if path is not None:
        figure.savefig(path)
    return figure
