"""An issue as every rule writes it, and phrases that several rules use."""

from __future__ import annotations

from ...names import display_name
from ...statistics.heads import HeadStats
from ..issue import StabilityIssue
from ..thresholds import THRESHOLDS

CLIP = "apply QK-clip at 30 after the optimizer step"
CLIP_AND_SLOW = (
    f"{CLIP} and halve the learning rate (get_intervention proposes both); QK-norm is the lasting fix"
)


def make_issue(
    issue_type: str,
    severity: str,
    place: tuple[str, int],
    value: float,
    name: str,
    evidence: str,
    suggestion: str,
) -> StabilityIssue:
    """An issue of the head at `place` (layer, number) whose `value` broke the threshold of that name."""
    layer, head = place
    entry = THRESHOLDS[name]
    return StabilityIssue(
        layer, head, issue_type, severity, float(value), entry.value, entry.source, evidence, suggestion
    )


def head_name(place: tuple[str, int]) -> str:
    """'head 3 of blocks.0.attention'."""
    layer, number = place
    return f"head {number} of {display_name(layer)}"


def peak(stats: HeadStats, number: float) -> str:
    """A maximum over rows; over a sample of the rows it is a lower bound."""
    return f"at least {number:.4g}" if stats.sampled else f"{number:.4g}"


def plus_minus(stderr: float) -> str:
    """The standard error of a mean over sampled rows; nothing where all rows were measured."""
    return f" ± {stderr:.1g}" if stderr > 0 else ""
