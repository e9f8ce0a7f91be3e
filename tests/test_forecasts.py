"""When scores saturate: the interval that is said, and what it takes no notice of."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from heads import snapshot

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bench" / "validation").is_dir():
    pytest.skip("the laboratory is in the checkout only", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench.validation import forecasts  # noqa: E402
from hnf_attention.diagnosis import StabilityIssue, diagnose  # noqa: E402
from hnf_attention.diagnosis.heads import concatenate_heads  # noqa: E402
from hnf_attention.diagnosis.thresholds import threshold  # noqa: E402


def grown(steps, slope=0.08, seed=None):
    """Snapshots of scores whose square root grows by that much a step, from 2, with some noise."""
    noise = np.zeros(max(steps) + 1) if seed is None else np.random.default_rng(seed).normal(0, 0.05, 10_000)
    return [snapshot(s, a={"max_logit": (2 + slope * s + noise[s]) ** 2}) for s in steps]


def coming(history):
    (heads,) = concatenate_heads(history, history[-1].layers)
    return heads.saturation


def test_the_interval_is_said_and_holds_the_line_and_its_delay():
    history = grown(range(10, 61, 10))  # sqrt(100) is 10, at step 100
    found = coming(history)
    assert found.steps == pytest.approx([40 + threshold("forecast_delay")] * 4)
    assert found.low == pytest.approx(threshold("forecast_low") * found.steps)
    assert found.high == pytest.approx(threshold("forecast_high") * found.steps)
    issue = next(x for x in diagnose(history).issues if x.issue_type == "overflow_risk")
    assert "saturates in 50 (20 to 205) steps" in issue.headline
    assert "it passes 100 to either side in 50 (20 to 205) steps" in issue.evidence
    said = issue.forecast
    assert (said.what, said.statistic, said.value, said.made) == (
        "passes 100 nats to either side",
        "logit_range_max",
        200.0,
        60,
    )
    assert (said.step, said.low, said.high) == pytest.approx((110.0, 60 + 20.5, 60 + 205.0))
    assert StabilityIssue(**json.loads(json.dumps(asdict(issue)))) == issue  # as in a checkpoint
    narrow = diagnose(history, thresholds={"forecast_low": 0.8, "forecast_high": 1.2})
    assert "saturates in 50 (40 to 60) steps" in narrow.issues[0].headline


@pytest.mark.parametrize("seed", range(5))
def test_gaps_between_the_readings_change_little(seed):
    draw = np.random.default_rng(seed)
    kept = sorted({11, *draw.choice(np.arange(12, 60), 7, replace=False).tolist(), 60})
    assert coming(grown(kept, seed=seed)).steps == pytest.approx(
        coming(grown(range(11, 61), seed=seed)).steps, rel=0.2
    )


@pytest.mark.parametrize("every", [1, 2, 5, 10, 20])
def test_it_is_the_same_at_any_cadence(every):
    assert coming(grown(range(20, 61, every))).steps == pytest.approx([50.0] * 4)


def test_a_rewind_and_a_fall_begin_anew():
    before, after = grown(range(10, 61, 10)), grown(range(70, 111, 10), slope=0.05)
    object.__setattr__(after[0], "jumped", True)
    assert coming([*before, *after]).steps == pytest.approx(coming(after).steps)
    assert np.isnan(coming([*before, after[0]]).steps).all()
    fallen = [snapshot(s, a={"max_logit": (2 + 0.05 * (s - 60)) ** 2}) for s in range(70, 121, 10)]
    assert coming([*before, *fallen]).steps == pytest.approx(coming(fallen).steps)


def case(wait, low=10.0, high=40.0, left=1000):
    return forecasts.Case("run", 20.0, low, high, wait, left)


def test_coverage_counts_what_the_run_could_show():
    found = [case(15.0), case(5.0), case(50.0), case(np.inf), case(np.inf, left=30)]
    row = forecasts.row(found)
    assert row["forecasts"] == 4 and row["left out"] == 1
    assert (row["coverage"], row["sooner"], row["later"]) == (0.25, 0.25, 0.5)
    empty = forecasts.row([])
    assert empty["forecasts"] == 0 and np.isnan(empty["coverage"])
