"""What a report says of forecasts, and of how often an issue meant harm."""

import json
from dataclasses import replace

import numpy as np
import pytest
from heads import snapshot
from report_parts import Parts

from hnf_attention import report
from hnf_attention.diagnosis import diagnose
from hnf_attention.report.page import forecasts, runs, stories
from hnf_attention.run_log.reader import Event


def told_forecast(values=None, head=1, **more):
    """The forecast of head 1 of layer b, at step 20 of a run with these ranges at steps 10, 20, ..., 60."""
    forecast = {"what": "passes 100 nats", "statistic": "logit_range_max", "value": 200.0, "made": 20}
    forecast |= {"step": 45.4, "low": 30.0, "high": 90.0} | more
    detail = {"layer": "b", "head": head, "issue_type": "overflow_risk", "severity": "error"}
    (story,) = stories.stories([Event(20, "issue", "new", detail | {"forecast": forecast})])
    table = np.full((6, 5), 500.0, np.float32)  # every other head is far beyond
    table[:, 3] = [1, 2, 3, 4, 5, 6] if values is None else values
    own = runs.Run("r", list(range(10, 70, 10)), {"a": (2, {}), "b": (3, {})}, {"logit_range_max": table})
    return forecasts.forecasts(story, own)


@pytest.mark.parametrize(
    ("values", "met", "end"),
    [
        ([999, 1, 1, 1, 200, 1], 50, "It came by step 50."),
        ([1, 1, 1, 1, np.inf, 1], 50, "It came by step 50."),
        ([1, 1, 1, 1, np.nan, 1], None, "It had not come by step 60."),
    ],
)
def test_a_forecast_is_told_with_its_interval_and_whether_it_came(values, met, end):
    (found,) = told_forecast(values)
    assert (found["head"], found["met"], found["low"], found["high"]) == (1, met, 30.0, 90.0)
    start = "At step 20: passes 100 nats near step 45, between steps 30 and 90 in four of five cases. "
    assert found["text"] == start + end
    assert (
        forecasts.earliest([found, found]) == f"Head 1. {found['text']} 1 more of its heads have a forecast."
    )


def test_a_forecast_of_the_future_is_not_due_and_one_without_an_interval_names_none():
    (found,) = told_forecast(step=80.0, low=None, high=None)
    assert found["text"] == "At step 20: passes 100 nats near step 80. It is not due yet."
    assert forecasts.earliest([]) == ""


@pytest.mark.parametrize(
    "more",
    [{"statistic": "key_norm"}, {"head": None}, {"head": 3}, {"head": -1}, {"head": "1"}, {"head": 1.5}],
)
def test_a_page_without_the_numbers_does_not_say_that_a_forecast_failed(more):
    (found,) = told_forecast([1, 1, 1, 1, 999, 1], **more)
    assert found["met"] is None
    assert found["text"].endswith("This page does not hold the numbers that say whether it came.")


@pytest.mark.parametrize(
    "bad",
    [
        {"step": "soon"},
        {"made": None},
        {"low": float("nan")},
        {"value": True},
        {"step": 10**400},
        {"value": float("-inf")},
    ],
)
def test_a_forecast_that_is_no_numbers_is_left_out(bad):
    assert told_forecast(**bad) == []


def test_a_page_says_how_often_such_issues_meant_harm_while_a_model_trains():
    history = [snapshot(s, a=dict(max_logit=(2 + 0.08 * s) ** 2)) for s in range(10, 61, 10)]
    text = report.html(diagnose(history)).text
    found = json.loads(Parts(text).scripts["report"])["runs"][0]["stories"]
    (story,) = [each for each in found if each["type"] == "overflow_risk"]
    assert story["measured"].startswith(
        "In 88% of such runs the loss suffered (45 of 51 in the laboratory). Source: "
    )
    assert len(story["forecasts"]) == 4 and story["forecast"].startswith(
        "Head 0. At step 60: passes 100 nats to either side near "
    )
    finished_text = report.html(diagnose([replace(each, training=False) for each in history])).text
    assert not any(
        x["measured"] for x in json.loads(Parts(finished_text).scripts["report"])["runs"][0]["stories"]
    )
