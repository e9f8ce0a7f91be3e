"""Issues that are new or worse, as a message for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..diagnosis import StabilityIssue
from ..diagnosis.issue import SEVERITIES, grouped, headline

#: Lines of a message; groups beyond that become their number.
MOST_LINES = 10


def subject(issues: Sequence[StabilityIssue]) -> str:
    """'Attention: 2 errors, 1 warning'."""
    count = Counter(issue.severity for issue in issues)
    found = [f"{count[name]} {name}{'s' * (count[name] > 1)}" for name in SEVERITIES if count[name]]
    return f"Attention: {', '.join(found) or 'no issues'}"


def body(issues: Sequence[StabilityIssue]) -> str:
    """A line for each group of heads: 'error: blocks.1 heads 0-3: scores range 413 -> QK-clip'."""
    groups = grouped(issues)
    groups.sort(key=lambda group: SEVERITIES.index(group[0].severity))
    lines = [f"{group[0].severity}: {headline(group)}" for group in groups[:MOST_LINES]]
    if len(groups) > MOST_LINES:
        lines.append(f"and {len(groups) - MOST_LINES} more")
    return "\n".join(lines)
