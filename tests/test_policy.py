"""Which fix is proposed for which issues."""

import pytest
import torch
import transformers
from attention_layers import SIZES, PlainBlock, Strange
from heads import head_stats, snapshot
from torch import nn

from hnf_attention import AttentionStabilityMonitor, apply_intervention
from hnf_attention.diagnosis import diagnose
from hnf_attention.interventions import InterventionPolicy
from hnf_attention.statistics.heads import Snapshot

t = transformers


@pytest.fixture
def model():
    return nn.ModuleDict(
        {
            "a": PlainBlock("qkv"),
            "b": PlainBlock("qkv"),
            "normed": Strange(qkv=nn.Linear(32, 96), q_norm=nn.LayerNorm(8)),
        }
    )


def growing(**layers):
    """Ten snapshots in which the largest score of each named layer rises to the given value."""
    return [
        snapshot(
            10 * step,
            **{name: {"max_logit": 5 + (top - 5) * (step / 10) ** 2} for name, top in layers.items()},
        )
        for step in range(1, 11)
    ]


def proposal(model, history):
    return InterventionPolicy(model).propose(diagnose(history))


def test_nothing_for_a_healthy_model(model):
    assert proposal(model, growing(a=5.0, b=6.0)) is None


def test_an_alarm_is_clipped_and_slowed(model):
    wanted = proposal(model, growing(a=2000.0))
    assert wanted["action"] == "qk_clip" and wanted["threshold"] == 30.0 and wanted["lr_factor"] == 0.5
    assert wanted["layers"] == {"a": [2000.0] * 4} and wanted.model is model
    assert "head 0 of a" in wanted["reason"]


def test_growth_below_the_alarm_is_clipped_only(model):
    history = [snapshot(s, a={"max_logit": 50.0 + s}) for s in range(1, 11)]  # slow
    assert proposal(model, history) is None
    history = [snapshot(10 * s, a={"max_logit": (2 + 0.52 * s) ** 2}) for s in range(1, 11)]
    wanted = proposal(model, history)
    assert wanted["action"] == "qk_clip" and "lr_factor" not in wanted


def test_large_scores_that_do_not_rise_are_left_alone(model):
    steady = [snapshot(s, a={"max_logit": 90.0}) for s in range(1, 11)]
    assert diagnose(steady).notes and proposal(model, steady) is None


COLLAPSED = {"normalized_entropy": 0.01, "saturated_share": 0.95, "max_weight": 0.9}


def test_a_collapse_with_growth_is_acted_on(model):
    def history(top):
        return [
            snapshot(10 * s, a=COLLAPSED | {"max_logit": top * (0.5 + s / 20)}, b={}) for s in range(1, 11)
        ]

    wanted = proposal(model, history(98.0))
    assert wanted["action"] == "qk_clip" and "lr_factor" not in wanted
    assert wanted["layers"] == {"a": [98.0] * 4}
    assert proposal(model, history(20.0)) is None  # sharp, with small scores: a note


@pytest.mark.parametrize("score", [5.0, 20.0, 50.0, 90.0])
@pytest.mark.parametrize("snapshots", [1, 10])
@pytest.mark.parametrize("sink", [0.0, 0.9])
def test_sharpness_without_growth_is_left_alone(model, score, snapshots, sink):
    sharp = COLLAPSED | {
        "max_weight": 0.99,
        "jacobian_trace_bound": 0.001,
        "max_logit": score,
        "sink_mass": sink,
    }
    history = [snapshot(s, a=sharp, b=sharp) for s in range(1, snapshots + 1)]
    assert diagnose(history).issues and not diagnose(history).errors and proposal(model, history) is None


def test_a_number_added_to_all_scores_is_left_alone(model):
    history = [
        snapshot(s, a={"max_logit": 500.0 * s + 40, "min_logit": 500.0 * s - 10}) for s in range(1, 11)
    ]
    assert proposal(model, history) is None


@pytest.mark.parametrize(
    "top, bottom, told",
    [
        (150.0, -150.0, 150.0),  # the largest |score|
        (200.0, -100.0, 200.0),
        (-20.0, -320.0, 300.0),  # all below 0: the range
        (5100.0, 4800.0, 300.0),  # a common offset is not clipped away
    ],
)
def test_how_much_is_clipped(model, top, bottom, told):
    """A size of 150 in each case. After the clip at 30 the largest |score| is 30, or the range is, with an offset."""
    history = [
        snapshot(10 * s, a={"max_logit": top, "min_logit": top - (top - bottom) * (s / 10) ** 2})
        for s in range(1, 11)
    ]
    assert proposal(model, history)["layers"] == {"a": [told] * 4}


def test_thresholds_of_the_diagnosis_hold_for_the_policy(model):
    history = [snapshot(10 * s, a=COLLAPSED | {"max_logit": 98 * (0.5 + s / 20)}) for s in range(1, 11)]
    strict = diagnose(history, thresholds={"rising_share": 0.9, "alarm_logit": 1e3})
    assert InterventionPolicy(model).propose(diagnose(history)) is not None
    assert InterventionPolicy(model).propose(strict) is None


def test_one_sharp_head_of_a_healthy_model_is_left_alone(model):
    sharp = head_stats(normalized_entropy=[0.03, 0.7, 0.7, 0.7], max_logit=[86.0, 5, 5, 5])
    history = [snapshot(s, a=sharp) for s in range(1, 6)]
    assert diagnose(history).notes and proposal(model, history) is None


def test_one_hot_heads_that_grow_and_cannot_be_clipped_get_dropout():
    layer = t.BertModel(t.BertConfig(**SIZES))
    name = "encoder.layer.0.attention.self"

    def history(one_hot, rise):
        return [
            snapshot(10 * s, **{name: dict(max_weight=one_hot, max_logit=(5.2 - rise * (10 - s)) ** 2)})
            for s in range(5, 11)
        ]

    most = [0.97, 0.98, 0.2, 0.2]
    wanted = proposal(layer, history(most, 0.8))
    assert wanted["action"] == "increase_dropout" and wanted["layer"] == name
    assert proposal(layer, history(most, 0.0)) is None
    assert proposal(layer, history([0.97, 0.2, 0.2, 0.2], 0.8)) is None
    other = [Snapshot(s.step, {"a": s.layers[name]}) for s in history(most, 0.8)]
    assert proposal(nn.ModuleDict({"a": PlainBlock("qkv")}), other) is None


BROKEN = {"nonfinite_rows": 3, "nonfinite_query": 3, "max_logit": 5000.0}


def test_non_finite_numbers_get_a_lower_rate_and_advice(model):
    wanted = proposal(model, [snapshot(1, a=BROKEN)])
    assert wanted["action"] == "reduce_lr" and wanted["factor"] == 0.5
    assert "restore the last checkpoint" in wanted["reason"]


@pytest.mark.parametrize(
    "numbers",
    [
        {"nonfinite_out": 3, "nonfinite_empty": 3},
        {"nonfinite_rows": 3, "score_kind": 1},
        {"nonfinite_out": 3, "dtype": "float16", "query_size": 9e3, "key_size": 1.0},
    ],
)
def test_a_lower_rate_mends_no_mask_and_no_format(model, numbers):
    diagnosis = diagnose([snapshot(1, a=numbers)])
    assert diagnosis.errors and InterventionPolicy(model).propose(diagnosis) is None


def test_a_finished_model_has_no_rate_to_cut(model):
    history = [snapshot(1, a=BROKEN)]
    object.__setattr__(history[0], "training", False)
    assert proposal(model, history) is None


def test_the_learning_rate_is_cut_if_no_layer_can_be_clipped(model):
    wanted = proposal(model, growing(normed=2000.0))
    assert wanted["action"] == "reduce_lr" and "weights that can be clipped" in wanted["reason"]
    both = proposal(model, growing(normed=2000.0, a=50.0))
    assert both["action"] == "qk_clip" and list(both["layers"]) == ["a"]
    apply_intervention(torch.optim.SGD(model.parameters(), lr=0.1), both)


def test_a_clip_is_repeated_but_the_rate_is_cut_once_per_window(model):
    policy = InterventionPolicy(model)
    history = growing(a=2000.0)
    first = policy.propose(diagnose(history))
    assert policy.propose(diagnose(history)) == first  # asked twice, answered the same
    cuts = []
    for step in range(110, 320, 10):
        history.append(snapshot(step, a={"max_logit": 2000.0 + 20 * step}))
        wanted = policy.propose(diagnose(history))
        assert wanted["action"] == "qk_clip"
        if "lr_factor" in wanted:
            cuts.append(step)
    assert cuts == [200]  # growth goes on at the same pace after it, so that a further cut would not help


def test_once_clipping_every_snapshot_above_the_threshold_is_clipped(model):
    policy = InterventionPolicy(model)
    history = growing(a=2000.0)
    policy.propose(diagnose(history))
    history.append(snapshot(110, a={"max_logit": 31.0}, b={"max_logit": 29.0}))
    diagnosis = diagnose(history)
    assert not diagnosis.has_issues()
    wanted = policy.propose(diagnosis)
    assert wanted["layers"] == {"a": [31.0] * 4} and "lr_factor" not in wanted
    history.append(snapshot(120, a={"max_logit": 30.0}))
    assert policy.propose(diagnose(history)) is None


def test_layers_that_are_no_modules_are_not_proposed(model):
    history = growing(a=2000.0)
    extra = {f"a [{n} heads of 8, float32]": s.layers["a"] for n, s in enumerate(history)}
    history[-1].layers.update(extra)
    assert list(proposal(model, history)["layers"]) == ["a"]


def test_there_is_no_fix_for_no_diagnosis(caplog):
    with AttentionStabilityMonitor(nn.Sequential(PlainBlock("qkv")), log_every=2) as monitor:
        assert monitor.get_intervention(monitor.on_step()) is None
    assert not caplog.records
