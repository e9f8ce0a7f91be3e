"""Which issues are news: those that are new, worse, better or gone since they were last reported."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from ..diagnosis import StabilityIssue
from ..diagnosis.issue import SEVERITIES

#: So many log steps in a row an issue has to be away (or milder) before it counts as gone (or better). This doubles for
#: an issue that got better or came back, up to the second number: an issue that comes and goes is soon silent.
HOLD, LONGEST_HOLD = 3, 48

_Key = tuple[str, int | None, str]  # layer, head, type


class Transitions(NamedTuple):
    """The news of one log step. new: they also hold those that came back. gone: as they were last reported."""

    new: list[StabilityIssue]
    worse: list[StabilityIssue]
    better: list[StabilityIssue]
    gone: list[StabilityIssue]


@dataclass
class _Known:
    """What was reported of an issue.

    issue: as it was last reported. quiet: log steps in a row in which it was away or milder. active: not gone.
    hold: how long it has to be quiet now.
    """

    issue: StabilityIssue
    quiet: int = 0
    active: bool = True
    hold: int = HOLD


class IssueTracker:
    """Compares the issues of each log step with what was reported before.

    An issue is new at its first log step, and worse at the first one with a graver severity. It is better or gone once
    it was milder or away at HOLD log steps in a row.
    """

    def __init__(self) -> None:
        self._known: dict[_Key, _Known] = {}

    def update(self, issues: Iterable[StabilityIssue], judged: bool = True) -> Transitions:
        """The news, given all issues of a log step.

        judged: whether every rule ran. If one did not, an issue that is away is not taken for gone.
        """
        news = Transitions([], [], [], [])
        now = {(issue.layer, issue.head, issue.issue_type): issue for issue in issues}
        for key, issue in now.items():
            known = self._known.get(key)
            if known is None:
                self._known[key] = _Known(issue)
                news.new.append(issue)
            elif not known.active:
                known.issue, known.quiet, known.active = issue, 0, True
                known.hold = min(2 * known.hold, LONGEST_HOLD)
                news.new.append(issue)
            elif _rank(issue) < _rank(known.issue):
                known.issue, known.quiet = issue, 0
                news.worse.append(issue)
            elif _rank(issue) == _rank(known.issue):
                known.quiet = 0
            elif self._held(known):
                known.issue, known.hold = issue, min(2 * known.hold, LONGEST_HOLD)
                news.better.append(issue)
        for key, known in self._known.items() if judged else ():
            if known.active and key not in now and self._held(known):
                known.active = False
                news.gone.append(known.issue)
        return news

    @staticmethod
    def _held(known: _Known) -> bool:
        known.quiet += 1
        if known.quiet < known.hold:
            return False
        known.quiet = 0
        return True

    def state_dict(self) -> list[dict[str, Any]]:
        """What was reported, as JSON types."""
        return [{**vars(known), "issue": _plain(known.issue)} for known in self._known.values()]

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        """Go on from what `state_dict` gave."""
        known = [_Known(**{**each, "issue": StabilityIssue(**each["issue"])}) for each in state]
        self._known = {(x.issue.layer, x.issue.head, x.issue.issue_type): x for x in known}


def _plain(issue: StabilityIssue) -> dict[str, Any]:
    """The issue's fields, with Python's own numbers in place of NumPy's."""
    return {name: x.item() if isinstance(x, np.generic) else x for name, x in asdict(issue).items()}


def _rank(issue: StabilityIssue) -> int:
    return SEVERITIES.index(issue.severity)
