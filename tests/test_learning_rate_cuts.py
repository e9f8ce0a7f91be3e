"""How often the policy cuts the learning rate: not below a floor, and only as long as it helps."""

import json

import numpy as np
import pytest
from heads import snapshot
from torch import nn

from hnf_attention.diagnosis import diagnose
from hnf_attention.interventions import InterventionPolicy
from hnf_attention.interventions.learning_rate import FLOOR, Cuts, Trouble, trouble


def cuts(history, count, value):
    """Steps at which the rate is cut; `value(step)` is the largest score of a layer that cannot be clipped."""
    policy, found = InterventionPolicy(nn.ModuleDict({"a": nn.Linear(2, 2)})), []
    for step in range(1, count + 1):
        history.append(snapshot(step, a=value(step)))
        proposed = policy.propose(diagnose(history))
        if proposed is not None and proposed["action"] == "reduce_lr":
            found.append(step)
    return found


def growing(pace):
    """Scores whose largest range grows by `pace(step)` at each step."""
    total = np.cumsum([pace(step) for step in range(0, 200)])

    def value(step):
        size = 1300.0 + total[step]
        return dict(max_logit=size, min_logit=-size)

    return value


def test_growth_that_goes_on_as_before_is_not_cut_again():
    # Nothing is known of the growth before the first cut, so that the second one is the first to be compared with.
    assert cuts([], 100, growing(lambda step: 50.0)) == [1, 11]


def test_growth_that_each_cut_slows_is_cut_down_to_the_floor():
    found = cuts([], 100, growing(lambda step: 1000.0 * 0.9**step))
    assert len(found) == 4 and 0.5 ** len(found) == FLOOR
    assert all(later - earlier >= 10 for earlier, later in zip(found, found[1:]))


def test_rows_that_stay_broken_are_cut_once():
    def broken(step):
        return dict(nonfinite_rows=100.0, rows=900.0, nonfinite_query=100.0)

    assert len(cuts([], 60, broken)) <= 1


@pytest.mark.parametrize(
    "now, before, helped",
    [
        (Trouble(0.0, 1.0), Trouble(0.0, 2.0), True),
        (Trouble(0.0, 2.0), Trouble(0.0, 2.0), False),
        (Trouble(0.0, -1.0), Trouble(0.0, np.nan), True),
        (Trouble(0.0, np.nan), Trouble(0.0, 1.0), True),
        (Trouble(0.1, 0.0), Trouble(0.5, 0.0), True),
        (Trouble(0.5, 0.0), Trouble(0.5, 9.0), False),
        (Trouble(0.5, 0.0), Trouble(0.0, 9.0), False),
        (Trouble(0.0, 9.0), Trouble(0.5, 1.0), True),
    ],
)
def test_whether_a_cut_helped(now, before, helped):
    assert now.less_than(before) == helped


def test_the_trouble_of_a_history():
    history = [snapshot(10 * i, a=dict(max_logit=10.0 * i, min_logit=-10.0 * i)) for i in range(1, 6)]
    assert trouble(history, 0) == Trouble(0.0, 1.0)
    assert trouble(history, 40).pace == 1.0 and np.isnan(trouble(history, 50).pace)
    mixed = [snapshot(1, a=dict(rows=300.0, nonfinite_rows=100.0), b=dict(rows=400.0))]
    assert trouble(mixed, 0).broken == pytest.approx(4 * 100 / (4 * 800))


def test_the_state_of_the_cuts_goes_through_json():
    before, after = Cuts(), Cuts()
    before.cut(0.5, Trouble(0.0, 3.0))
    before.cut(0.25, Trouble(0.0, 2.0))
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    for factor, now in [(0.5, Trouble(0.0, 1.0)), (0.4, Trouble(0.0, 1.0)), (0.5, Trouble(0.0, 2.0))]:
        assert before.allows(factor, now) == after.allows(factor, now)
    assert after.allows(0.5, Trouble(0.0, 1.0)) and not after.allows(0.4, Trouble(0.0, 1.0))
