"""The rules, one a file, which yield issues about the latest snapshot.

What only the sentences need is computed after some head broke the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ...statistics.heads import Snapshot
from ..heads import Heads
from ..issue import StabilityIssue
from . import (
    dormant_attention,
    empty_rows,
    entropy_collapse,
    non_finite,
    one_hot_attention,
    overflow_risk,
    resting_layers,
    vanishing_gradient,
)

#: (history, oldest first; some heads of its last snapshot, with their trends) -> issues of these heads
HeadRule = Callable[[Sequence[Snapshot], Heads], Iterator[StabilityIssue]]
HEAD_RULES: tuple[HeadRule, ...] = (
    overflow_risk.rule,
    entropy_collapse.rule,
    vanishing_gradient.rule,
    one_hot_attention.rule,
)
#: (history, oldest first; all heads of its last snapshot, in groups) -> issues of the model
ModelRule = Callable[[Sequence[Snapshot], Sequence[Heads]], Iterator[StabilityIssue]]
MODEL_RULES: tuple[ModelRule, ...] = (
    non_finite.rule,
    dormant_attention.rule,
    resting_layers.rule,
    empty_rows.rule,
)
