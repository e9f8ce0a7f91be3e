"""What a monitor logs of issues: one short line for each group of heads. The details are in the diagnosis."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..diagnosis import StabilityIssue
from ..diagnosis.issue import grouped, headline
from .transitions import Transitions

_log = logging.getLogger("hnf_attention")
_LEVELS = {"error": logging.ERROR, "warning": logging.WARNING, "note": logging.INFO}


def log_transitions(news: Transitions, step: int) -> None:
    """Log what changed: issues that are new or worse at their severity's level, those better or gone as information."""
    for group in grouped([*news.new, *news.worse]):
        _log.log(_LEVELS[group[0].severity], "%s", headline(group))
    for group in grouped(news.better):
        _log.info("better at step %d, now a %s: %s", step, group[0].severity, _what(group))
    for group in grouped(news.gone):
        _log.info("resolved at step %d: %s", step, _what(group))


def _what(group: Sequence[StabilityIssue]) -> str:
    """'overflow_risk in blocks.1.attention heads 0-3'."""
    return f"{group[0].issue_type} in {headline(group).partition(': ')[0]}"
