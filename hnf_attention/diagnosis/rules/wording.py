"""An issue as every rule writes it, and phrases that several rules use."""

from __future__ import annotations

from math import sqrt

import numpy as np

from ...names import display_name
from ..heads import Heads
from ..issue import Crossing, StabilityIssue
from ..measured import CLIP_FIX, RESOLVED, RESTART_FIX
from ..thresholds import THRESHOLDS, threshold

SHORT_CLIP = "QK-clip at 30"
CLIP = f"apply {SHORT_CLIP} after the optimizer step"
SHORT_RESTART = "go back, a lower rate"
_RESTART, _CLIP_AND_SLOW = (RESOLVED[fix] for fix in (RESTART_FIX, CLIP_FIX))
RESTART = (
    "go back to a state from before the first warning, and train on at a lower learning rate: get_intervention proposes"
    f" it to a monitor with good_states, and it resolved {_RESTART.count} of {_RESTART.total} such runs in the "
    f"laboratory. Without such a state it proposes {SHORT_CLIP} and half the rate, which resolved "
    f"{_CLIP_AND_SLOW.count} of {_CLIP_AND_SLOW.total}"
)


def make_issue(
    issue_type: str,
    severity: str,
    place: tuple[str, int | None],
    value: float,
    name: str,
    evidence: str,
    suggestion: str,
    brief: str,
    forecast: Crossing | None = None,
) -> StabilityIssue:
    """An issue at `place` (layer, number of the head) whose `value` broke the threshold of that name."""
    layer, head = place
    limit, source = threshold(name), THRESHOLDS[name].source
    if limit != THRESHOLDS[name].value:
        source = "chosen by the caller of the diagnosis"
    return StabilityIssue(
        layer,
        head,
        issue_type,
        str(severity),
        float(value),
        limit,
        source,
        evidence,
        suggestion,
        brief,
        forecast,
    )


class Scores:
    """How the size of heads' scores is said: by the largest range of a row, which the softmax sees."""

    def __init__(self, heads: Heads) -> None:
        self._heads = heads
        self._range = heads.stats.logit_range_max
        self._whole = np.abs(self._range - 2.0 * heads.score) <= 1e-9 * np.abs(self._range)

    def short(self, head: int) -> str:
        """'scores range 413'. A maximum over a sample of the rows is a lower bound."""
        bound = ">= " if self._heads.stats.sampled else ""
        if self._whole[head]:
            return f"scores range {bound}{self._range[head]:.4g}"
        return f"largest score {bound}{self._heads.score[head]:.4g}"

    def text(self, head: int) -> str:
        """'scores range over 413 nats'."""
        bound = "at least " if self._heads.stats.sampled else ""
        if self._whole[head]:
            return f"scores range over {bound}{self._range[head]:.4g} nats"
        return f"scores beside a bias reach {bound}{self._heads.score[head]:.4g} nats"

    def pace(self, head: int) -> str:
        """', doubling every 12 steps' for scores that rise, by the line of their square root."""
        line = self._heads.root_score
        if not self._heads.rising[head] or not line.level[head] > 0:
            return ""
        return (
            f", doubling every {max(1.0, (sqrt(2.0) - 1.0) * line.level[head] / line.slope[head]):.0f} steps"
        )


def head_name(place: tuple[str, int]) -> str:
    """'head 3 of blocks.0.attention'."""
    layer, number = place
    return f"head {number} of {display_name(layer)}"


def plus_minus(stderr: float) -> str:
    """The standard error of a mean over sampled rows; nothing where all rows were measured."""
    return f" ± {stderr:.1g}" if stderr > 0 else ""
