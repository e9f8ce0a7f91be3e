"""What a monitor logs of issues: one short line for each group of heads. The details are in the diagnosis."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..diagnosis import StabilityIssue
from ..diagnosis.issue import grouped, heads_text
from ..names import display_name
from .transitions import Transitions

_log = logging.getLogger("hnf_attention")
MAX_LINE = 160


def log_transitions(news: Transitions, step: int) -> None:
    """Log what changed: issues that are new or worse at their severity's level, those better or gone as information."""
    for group in grouped([*news.new, *news.worse]):
        _log.log(logging.ERROR if group[0].severity == "error" else logging.WARNING, "%s", issue_line(group))
    for group in grouped(news.better):
        _log.info("%s", _cut(f"better at step {step}, now a {group[0].severity}: {_what(group)}"))
    for group in grouped(news.gone):
        _log.info("%s", _cut(f"resolved at step {step}: {_what(group)}"))


def issue_line(group: Sequence[StabilityIssue]) -> str:
    """'LAYER head 2: scores range 413, doubling every 12 steps -> QK-clip at 30', of the group's worst head."""
    worst = group[0]
    return _cut(f"{_where(group)}: {_headline(worst)}")


def _headline(issue: StabilityIssue) -> str:
    """The issue's own short text, or its evidence and its suggestion."""
    short = getattr(issue, "headline", "")
    if short:
        return short
    evidence = issue.evidence
    head, colon, rest = evidence.partition(": ")
    if colon and (head == display_name(issue.layer) or head.endswith(f" of {display_name(issue.layer)}")):
        evidence = rest  # the line names the place itself
    advice = issue.suggestion.partition(" (")[0].partition(";")[0]
    return f"{issue.issue_type}: {_cut(evidence, 80)} -> {advice}"


def _where(group: Sequence[StabilityIssue]) -> str:
    """The layer, whose end is kept if the name is long, and the heads."""
    layer = display_name(group[0].layer)
    layer = layer if len(layer) <= 50 else f"...{layer[-47:]}"
    return f"{layer}{_cut(heads_text(group), 30)}"


def _what(group: Sequence[StabilityIssue]) -> str:
    return f"{group[0].issue_type} in {_where(group)}"


def _cut(text: str, limit: int = MAX_LINE) -> str:
    """The text, cut between words to at most that many characters."""
    text = " ".join(text.split()) if "\n" in text else text
    if len(text) <= limit:
        return text
    return f"{text[: limit - 4].rpartition(' ')[0] or text[: limit - 4]} ..."
