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
        """'88%'."""
        return f"{self.count / self.total:.0%}"


_HELD_OUT = (
    "docs/validation.md, experiment 1: 105 held-out runs of the sweep and 10 with QK-norm, 43% of them harmed"
)
_FAILURES = "docs/validation.md, experiment 2: 10 runs that failed, from the first error on"

#: Severity to the runs in which such an issue, or a graver one, came, and those of them that attention harmed: that
#: ended 0.1 nat or more above the same run with QK-norm.
HARMED: dict[str, Count] = {
    "error": Count(45, 51, _HELD_OUT),
    "warning": Count(48, 59, _HELD_OUT),
}
RESTART_FIX = "a restart from before the first warning at a lower rate"
CUT_FIX = "a lower rate alone"
CLIP_FIX = "QK-clip at log steps and half the rate"
#: Fix to the failing runs in which it was tried, and those that ended less than 0.25 nat above the best that their
#: configuration reached.
RESOLVED: dict[str, Count] = {
    RESTART_FIX: Count(27, 29, "docs/validation.md, experiment 2: 29 held-out runs that failed"),
    CLIP_FIX: Count(2, 10, _FAILURES),
    CUT_FIX: Count(1, 7, _FAILURES),
}


def harm_text(severity: str, issue_type: str) -> str:
    """'in 88% of such runs the loss suffered (45 of 51 in the laboratory)'; '' for what was not counted."""
    known = HARMED.get(severity) if issue_type in COUNTED else None
    if known is None:
        return ""
    return (
        f"in {known.share} of such runs the loss suffered ({known.count} of {known.total} in the laboratory)"
    )


def help_text(fix: str) -> str:
    """'A restart ... resolved 27 of 29 failing runs in the laboratory'."""
    known = RESOLVED[fix]
    return f"{fix[0].upper()}{fix[1:]} resolved {known.count} of {known.total} failing runs in the laboratory"
