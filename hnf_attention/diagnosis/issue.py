"""One diagnosed problem, and groups of problems for people to read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from ..names import display_name
from .measured import harm_text

#: Worst first. A note is worth saying and no reason for alarm.
SEVERITIES = ("error", "warning", "note")
ISSUE_TYPES = (
    "non_finite",
    "overflow_risk",
    "entropy_collapse",
    "vanishing_gradient",
    "one_hot_attention",
    "dormant_attention",
    "empty_rows",
)
#: Types of version 0.1, which old logs and scripts contain, to today's.
FORMER_ISSUE_TYPES = {"attention_spike": "one_hot_attention"}
HEADLINE_LENGTH = 160
_PLACE_LENGTH = 64
_LOW_IS_BAD = ("entropy_collapse", "vanishing_gradient")


@dataclass(frozen=True)
class Crossing:
    """A forecast: something will happen at a step.

    what: in words, such as "passes 100 nats". value: what the head's `statistic` is then, by its name in `HeadStats`.
    made: the step at which it was said. step: the most likely one.
    low, high: from when to when in four of five cases; None where that was not counted.
    """

    what: str
    statistic: str
    value: float
    made: int
    step: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, repr=False)
class StabilityIssue:
    """One diagnosed problem: where it is, what it is, how bad, on what evidence, and what to do.

    layer: the module's name in the model; "" for the whole model. head: None for an issue of the whole layer.
    issue_type: one of ISSUE_TYPES; a name of version 0.1 becomes today's. severity: one of SEVERITIES.
    value: the number that was compared with `threshold`. source: where that threshold comes from.
    evidence: a sentence with the numbers and the step. suggestion: what to do.
    brief: evidence and suggestion in a few words, "what is wrong -> what helps".
    forecast: of a head that gets worse, when it will break; None where nothing is forecast.
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
    brief: str = ""
    forecast: Crossing | None = None

    def __post_init__(self) -> None:
        if isinstance(self.forecast, Mapping):  # from JSON
            object.__setattr__(self, "forecast", Crossing(**self.forecast))
        object.__setattr__(self, "issue_type", FORMER_ISSUE_TYPES.get(self.issue_type, self.issue_type))

    def __repr__(self) -> str:
        where = f"{display_name(self.layer)}{heads_text([self])}"
        numbers = f"value {self.value:.4g}, threshold {self.threshold:.4g}"
        return f"StabilityIssue({self.severity}: {self.issue_type} in {where}, {numbers})"

    @property
    def measured(self) -> str:
        """How often such an issue of a model in training meant harm in the laboratory; "" if that was not counted."""
        return harm_text(self.severity, self.issue_type)

    @property
    def headline(self) -> str:
        """The issue in one line of at most HEADLINE_LENGTH characters: 'blocks.1 head 2: scores range 413 -> ...'."""
        return headline([self])


def headline(group: Sequence[StabilityIssue]) -> str:
    """A group of `grouped` in one line of at most HEADLINE_LENGTH characters: its heads, its first issue's words."""
    worst = group[0]
    what, arrow, cure = (worst.brief or worst.issue_type.replace("_", " ")).partition(" -> ")
    end = f"{arrow}{cure}"
    start = f"{_place(group)}: "
    room = HEADLINE_LENGTH - len(start) - len(end)
    if len(what) > room:
        what = f"{what[: max(room - 4, 0)].rstrip()} ..."
    return f"{start}{what}{end}"[:HEADLINE_LENGTH]


def _place(group: Sequence[StabilityIssue]) -> str:
    """'blocks.1.attention heads 0-3'; a long name loses its start, a long list of heads becomes their number."""
    heads = heads_text(group)
    if len(heads) > _PLACE_LENGTH // 3:
        heads = f" {len(group)} heads"
    layer, room = display_name(group[0].layer), _PLACE_LENGTH - len(heads)
    return f"{layer if len(layer) <= room else '...' + layer[3 - room :]}{heads}"


def grouped(issues: Sequence[StabilityIssue]) -> list[list[StabilityIssue]]:
    """Issues of one severity, type and layer together, in their order; each group starts with its worst."""

    def kind(issue: StabilityIssue) -> tuple[str, str, str]:
        return issue.severity, issue.issue_type, issue.layer

    groups = [list(group) for _, group in groupby(sorted(issues, key=kind), key=kind)]
    groups = [sorted(group, key=_excess, reverse=True) for group in groups]
    order = {kind(issue): position for position, issue in reversed(list(enumerate(issues)))}
    return sorted(groups, key=lambda group: order[kind(group[0])])


def heads_text(group: Sequence[StabilityIssue]) -> str:
    """' head 3', ' heads 0-3, 7', or nothing for an issue of the whole layer."""
    return number_text(issue.head for issue in group if issue.head is not None)


def number_text(numbers: Iterable[int]) -> str:
    """' head 3', ' heads 0-3, 7', or nothing for no number."""
    heads = sorted(numbers)
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
    """How far an issue is beyond its threshold; comparable within one type."""
    beyond = issue.value - issue.threshold
    return -beyond if issue.issue_type in _LOW_IS_BAD else beyond
