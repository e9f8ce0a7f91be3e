"""The rules, one a file: each reads heads and yields issues about their latest snapshot.

What only the sentences need is computed after some head broke the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ...statistics.heads import Snapshot
from ..heads import Heads
from ..issue import StabilityIssue
from . import entropy_collapse, non_finite, one_hot_attention, overflow_risk, vanishing_gradient

#: (history, oldest first; some heads of its last snapshot, with their trends) -> issues of these heads
Rule = Callable[[Sequence[Snapshot], Heads], Iterator[StabilityIssue]]
RULES: tuple[Rule, ...] = (
    non_finite.rule,
    overflow_risk.rule,
    entropy_collapse.rule,
    vanishing_gradient.rule,
    one_hot_attention.rule,
)
