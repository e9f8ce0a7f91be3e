"""Which issues are news, and the lines that are logged of them."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest

from hnf_attention import StabilityIssue
from hnf_attention.monitoring.lines import log_transitions
from hnf_attention.monitoring.transitions import HOLD, LONGEST_HOLD, IssueTracker, Transitions

WARNING = StabilityIssue(
    layer="blocks.1.attn",
    head=2,
    issue_type="overflow_risk",
    severity="warning",
    value=413.0,
    threshold=100.0,
    source="a paper",
    evidence="head 2 of blocks.1.attn: largest |score| 413 at step 40, above where QK-clip acts",
    suggestion="apply QK-clip at 30 after the optimizer step (get_intervention proposes it)",
    brief="scores range 413 -> QK-clip at 30",
)
ERROR = replace(WARNING, severity="error")
OTHER = replace(WARNING, head=5)


def news(tracker, *issues):
    """Names of the kinds of news with how many issues each has, of those that have any."""
    found = tracker.update(issues)._asdict()
    return {kind: len(issues) for kind, issues in found.items() if issues}


def test_an_issue_is_new_once():
    tracker = IssueTracker()
    assert news(tracker, WARNING) == {"new": 1}
    assert news(tracker, WARNING, OTHER) == {"new": 1}
    assert news(tracker, WARNING, OTHER) == {}


def test_worse_at_once_better_and_gone_after_a_while():
    tracker = IssueTracker()
    assert news(tracker, WARNING) == {"new": 1}
    assert news(tracker, ERROR) == {"worse": 1}
    assert [news(tracker, WARNING) for _ in range(HOLD)] == [{}] * (HOLD - 1) + [{"better": 1}]
    away = [news(tracker) for _ in range(2 * HOLD)]
    assert away == [{}] * (2 * HOLD - 1) + [
        {"gone": 1}
    ]  # as it got better before, it has to be away twice as long
    assert news(tracker) == {}


def test_an_issue_that_returns_is_new_again():
    tracker = IssueTracker()
    news(tracker, WARNING)
    assert [news(tracker) for _ in range(HOLD)][-1] == {"gone": 1}
    assert news(tracker, WARNING) == {"new": 1}


def test_a_short_absence_is_no_news():
    tracker = IssueTracker()
    news(tracker, WARNING)
    for _ in range(20):
        assert all(news(tracker, *now) == {} for now in ([], [], [WARNING]))


@pytest.mark.parametrize("gap", [HOLD, HOLD + 2])
def test_an_issue_that_comes_and_goes_is_soon_silent(gap):
    tracker, said = IssueTracker(), 0
    for _ in range(100):
        for now in [[WARNING], *[[]] * gap]:
            said += bool(news(tracker, *now))
    assert said <= 2 * np.log2(LONGEST_HOLD / HOLD)


def test_a_severity_that_comes_and_goes_is_soon_silent():
    tracker, said = IssueTracker(), 0
    for _ in range(100):
        for now in (ERROR, *[WARNING] * HOLD):
            said += bool(news(tracker, now))
    assert said <= 2 * np.log2(LONGEST_HOLD / HOLD)


def test_the_state_goes_through_json():
    tracker = IssueTracker()
    news(tracker, replace(ERROR, value=np.float64(7.0)), OTHER)
    news(tracker, OTHER)
    resumed = IssueTracker()
    resumed.load_state_dict(json.loads(json.dumps(tracker.state_dict())))
    for now in ([OTHER], [], [ERROR, OTHER], [], [], [], []):
        assert news(resumed, *now) == news(tracker, *now)


# Lines


def test_levels_of_the_lines(caplog):
    caplog.set_level(logging.INFO, logger="hnf_attention")
    three = replace(WARNING, layer="blocks.3.attn")
    note = replace(WARNING, severity="note", layer="long." * 60 + "attn", brief="x" * 200)
    log_transitions(Transitions([WARNING, OTHER, note], [replace(ERROR, head=7)], [three], [OTHER]), 90)
    levels = [(r.levelname, r.getMessage()) for r in caplog.records]
    assert [level for level, _ in levels] == ["WARNING", "INFO", "ERROR", "INFO", "INFO"]
    assert levels[0][1] == "blocks.1.attn heads 2, 5: scores range 413 -> QK-clip at 30"
    assert all(len(line) <= 160 for _, line in levels)
    assert levels[3][1] == "better at step 90, now a warning: overflow_risk in blocks.3.attn head 2"
    assert levels[4][1] == "resolved at step 90: overflow_risk in blocks.1.attn head 5"
