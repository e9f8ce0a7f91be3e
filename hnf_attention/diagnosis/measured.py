"""What the laboratory counted: how often a severity meant harm, and how often a fix helped. See docs/validation.md.

A severity's numbers are those of its held-out runs, which chose no threshold; a fix's are those of runs that failed.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Issue types whose severities were counted: those of growing and collapsing heads.
COUNTED = ("overflow_risk", "entropy_collapse", "vanishing_gradient", "one_hot_attention")


@dataclass(frozen=True)
class Count:
    """`count` of `total` runs. source: of the numbers."""

    count: int
    total: int
    source: str

    @property
    def share(self) -> str:
        """'86%'."""
        return f"{self.count / self.total:.0%}"


_HELD_OUT = (
    "docs/validation.md, experiment 1: 60 held-out runs of the sweep and 5 with QK-norm, 35% of them harmed"
)
_FAILURES = "docs/validation.md, experiment 2: 10 runs that failed"

#: Severity to the runs in which such an issue, or a graver one, came, and those of them that attention harmed: that
#: ended 0.1 nat or more above the same run with QK-norm.
HARMED: dict[str, Count] = {
    "error": Count(19, 22, _HELD_OUT),
    "warning": Count(22, 28, _HELD_OUT),
}
RESTART_FIX = "a rewind, QK-norm and a quarter of the rate"
CUT_FIX = "a lower rate alone"
CLIP_FIX = "QK-clip at log steps and half the rate"
#: Fix to the failing runs in which it was tried, and those that ended less than 0.25 nat above the best that their
#: configuration reached.
RESOLVED: dict[str, Count] = {
    RESTART_FIX: Count(7, 10, f"{_FAILURES}, from the first warning on"),
    CLIP_FIX: Count(2, 10, f"{_FAILURES}, from the first error on"),
    CUT_FIX: Count(1, 7, f"{_FAILURES}, from the first error on"),
}


def harm_text(severity: str, issue_type: str) -> str:
    """'in 86% of such runs the loss suffered (19 of 22 in the laboratory)'; '' for what was not counted."""
    known = HARMED.get(severity) if issue_type in COUNTED else None
    if known is None:
        return ""
    return (
        f"in {known.share} of such runs the loss suffered ({known.count} of {known.total} in the laboratory)"
    )


def help_text(fix: str) -> str:
    """'A rewind, ... resolved 7 of 10 failing runs in the laboratory'."""
    known = RESOLVED[fix]
    return f"{fix[0].upper()}{fix[1:]} resolved {known.count} of {known.total} failing runs in the laboratory"
