"""The monitor in training loops that go well, badly, and where its own parts fail."""

import logging

import pytest
import torch
from attention_models import Attention
from tiny_gpt2 import LAYERS, heat, tiny_gpt2
from torch import nn

import hnf_attention.monitoring.monitor
import hnf_attention.monitoring.recorder
from hnf_attention import AttentionStabilityMonitor, apply_intervention

TOKENS = torch.randint(0, 40, (4, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return tiny_gpt2()


@pytest.fixture
def optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


@pytest.fixture
def train_step(optimizer):
    def step(model, batch=TOKENS):
        optimizer.zero_grad()
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        return loss

    return step


def test_the_proposal_as_written(model, optimizer, train_step):
    heat(model)
    loader = [TOKENS] * 6
    applied = []

    monitor = AttentionStabilityMonitor(model, log_every=2)
    for batch in loader:
        loss = train_step(model, batch)
        diagnosis = monitor.on_step()  # None between log steps
        if diagnosis and diagnosis.has_issues():
            intervention = monitor.get_intervention(diagnosis)
            if intervention:
                apply_intervention(optimizer, intervention)
                applied.append((diagnosis.step, intervention["action"]))

    assert applied[0] == (2, "qk_clip") and loss.isfinite()
    assert [s.step for s in monitor.history] == [2, 4, 6]
    tops = [max(s.layers[name].max_abs_logit.max() for name in LAYERS) for s in monitor.history]
    assert tops[0] > 1000 and tops[1] < 100
    assert optimizer.param_groups[0]["lr"] == 5e-4


def test_a_healthy_run_says_nothing(model, train_step, caplog):
    monitor = AttentionStabilityMonitor(model, log_every=3)
    seen = []
    for step in range(1, 10):
        train_step(model)
        diagnosis = monitor.on_step()
        assert (diagnosis is not None) == (step % 3 == 0) and monitor.step == step
        if diagnosis:
            seen.append(diagnosis)
            assert not diagnosis.has_issues() and monitor.get_intervention(diagnosis) is None
            assert list(diagnosis.stats) == LAYERS and diagnosis.step == step
            assert (diagnosis.stats[LAYERS[0]].rows == 4 * 24).all()
    assert len(seen) == 3 and [len(d.history) for d in seen] == [1, 2, 3]
    assert not ours(caplog)


def test_record_every_step(model, train_step):
    monitor = AttentionStabilityMonitor(model, log_every=3, record_every=1)
    for _ in range(3):
        train_step(model)
        diagnosis = monitor.on_step()
    assert (diagnosis.stats[LAYERS[1]].rows == 3 * 4 * 24).all()


def test_a_layer_that_is_the_model_itself_has_a_name_in_the_log(caplog):
    model = Attention()
    with torch.no_grad():
        model.qkv.weight *= 100.0
    monitor = AttentionStabilityMonitor(model, log_every=1)
    model(torch.randn(2, 20, 16))
    monitor.on_step()
    assert any(
        r.getMessage().startswith("(the model itself) heads 0-3: scores range ") for r in caplog.records
    )


def test_it_does_not_change_the_training(model, train_step):
    def losses(monitored):
        torch.manual_seed(1)
        fresh = type(model)(model.config)
        optimizer = torch.optim.AdamW(fresh.parameters(), lr=1e-3)
        monitor = AttentionStabilityMonitor(fresh, log_every=2, record_every=1) if monitored else None
        out = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = fresh(TOKENS, labels=TOKENS).loss
            loss.backward()
            optimizer.step()
            out.append(loss.item())
            if monitor:
                monitor.on_step()
        return out

    assert losses(True) == losses(False)


def test_issues_are_logged_once_and_again_when_they_worsen(model, caplog):
    monitor = AttentionStabilityMonitor(model, log_every=1)

    def step():
        with torch.no_grad():
            model(TOKENS)
        caplog.clear()
        diagnosis = monitor.on_step()
        return diagnosis, [r for r in caplog.records if ": scores range" in r.getMessage()]

    heat(model, 60.0)
    diagnosis, records = step()
    assert {i.severity for i in diagnosis.issues if i.issue_type == "overflow_risk"} == {"warning"}
    assert records and all(r.levelno == logging.WARNING and r.name == "hnf_attention" for r in records)
    assert len(records) == len({i.layer for i in diagnosis.issues if i.issue_type == "overflow_risk"})
    assert step()[1] == []
    heat(model, 4.0)
    diagnosis, records = step()
    assert diagnosis.errors and {r.levelno for r in records} == {logging.ERROR}
    assert step()[1] == []
    heat(model, 1 / 4)
    assert step()[1] == []  # known as a warning, too


def test_an_error_that_falls_back_to_a_warning_is_no_news(model, caplog):
    heat(model)
    monitor = AttentionStabilityMonitor(model, log_every=1)
    for factor in (1 / 3, 1.0):
        with torch.no_grad():
            model(TOKENS)
        caplog.clear()
        diagnosis = monitor.on_step()
        heat(model, factor)
    overflow = [i.severity for i in diagnosis.issues if i.issue_type == "overflow_risk"]
    assert set(overflow) == {"warning"}
    assert "overflow_risk" not in caplog.text


def test_writers_get_every_diagnosis_and_a_failing_one_rests_longer_each_time(model, train_step, caplog):
    class Writer:
        def __init__(self):
            self.steps = []

        def write(self, diagnosis):
            self.steps.append(diagnosis.step)

    class Failing(Writer):
        def write(self, diagnosis):
            super().write(diagnosis)
            raise OSError("disk full")

    good, bad, calls = Writer(), Failing(), []
    monitor = AttentionStabilityMonitor(model, log_every=1, writers=[bad, good, calls.append, Failing()])
    for _ in range(3):
        train_step(model)
        assert monitor.on_step() is not None
    assert str(monitor.status.off["writer 0 (Failing)"]) == (
        "off since step 1 (2 failures): OSError: disk full; tried again at step 4"
    )
    assert good.steps == [1, 2, 3] and bad.steps == [1, 1, 2] and [d.step for d in calls] == [1, 2, 3]
    messages = ours(caplog)
    assert len(messages) == 2 and "writer 0 (Failing)" in messages[0] and "writer 3" in messages[1]
    assert "disk full" in caplog.text
    assert {r.levelno for r in caplog.records if r.name.startswith("hnf_attention")} == {logging.WARNING}


def test_writers_are_closed_at_the_end_once(model, train_step, caplog):
    class Writer:
        def __init__(self, *faults):
            self.faults, self.closed = faults, 0

        def write(self, diagnosis):
            if "write" in self.faults:
                raise OSError("disk full")

        def close(self):
            self.closed += 1
            if "close" in self.faults:
                raise OSError("disk full")

    good, resting, stuck = Writer(), Writer("write"), Writer("close")
    with AttentionStabilityMonitor(model, log_every=1, writers=[stuck, resting, good]) as monitor:
        train_step(model)
        monitor.on_step()
    monitor.restore()  # a second time
    assert (good.closed, resting.closed, stuck.closed) == (1, 1, 1)
    failed, closing, ends = ours(caplog)
    assert "writer 1 (Writer)' failed at step 1" in failed and "closing of writer 0" in closing
    assert ends == "writer 1 (Writer) ends with 1 log steps that it did not take"


def test_a_resumed_run_counts_on(model, train_step):
    monitor = AttentionStabilityMonitor(model, log_every=3, step=4)
    steps = []
    for _ in range(5):
        train_step(model)
        diagnosis = monitor.on_step()
        steps += [] if diagnosis is None else [(diagnosis.step, diagnosis.stats[LAYERS[0]].rows[0])]
    assert steps == [(6, 4 * 24), (9, 4 * 24)] and monitor.step == 9


def ours(caplog):
    """What this package logged: other libraries have warnings of their own."""
    return [r.getMessage() for r in caplog.records if r.name.startswith("hnf_attention")]


def fail(*_):
    raise ZeroDivisionError("on purpose")


def test_a_fault_in_the_rules_is_logged_once(model, train_step, caplog, monkeypatch):
    monkeypatch.setattr(hnf_attention.monitoring.monitor, "diagnose", fail)
    monitor = AttentionStabilityMonitor(model, log_every=1)
    for _ in range(3):
        train_step(model)
        assert (diagnosis := monitor.on_step()).not_judged and diagnosis.healthy is None
    assert len(ours(caplog)) == 1 and "'diagnosis'" in caplog.text and "on purpose" in caplog.text
    assert len(monitor.history) == 3


def test_after_a_fault_in_reading_the_model_is_not_measured_until_the_next_attempt(
    model, train_step, caplog, monkeypatch
):
    monitor, measured = AttentionStabilityMonitor(model, log_every=2, record_every=1), []
    read = monitor._recorder.read
    monkeypatch.setattr(monitor._recorder, "read", fail)
    for step in range(1, 17):
        if step == 9:
            monkeypatch.setattr(monitor._recorder, "read", read)
        if monitor.instrumentation.measuring:
            measured.append(step)
        train_step(model)
        diagnosis = monitor.on_step()
        assert (diagnosis is not None) == (step == 16)
    # Attempts fail at the log steps 2, 4 and 8. The next one is four log steps later.
    assert measured == [1, 2, 3, 4, 7, 8, 15, 16]
    assert ["works again at step 16, after 3 failures since step 2" in x for x in ours(caplog)] == [
        False,
        True,
    ]


def test_a_fault_in_folding_ends_neither_the_step_nor_the_run(model, train_step, caplog, monkeypatch):
    monitor = AttentionStabilityMonitor(model, log_every=1)
    monkeypatch.setattr(hnf_attention.monitoring.recorder.fold, "fold", fail)
    for _ in range(3):
        train_step(model)
        assert monitor.on_step() is None
    assert "on purpose" in caplog.text
    assert len(ours(caplog)) == 1 and "could not measure" in ours(caplog)[0]


def test_a_fault_in_the_advice(model, train_step, caplog, monkeypatch):
    monitor = AttentionStabilityMonitor(model, log_every=1)
    monkeypatch.setattr(monitor._treatment.policy, "propose", fail)
    for _ in range(2):
        train_step(model)
        assert monitor.get_intervention(monitor.on_step()) is None
    assert len(ours(caplog)) == 1 and "'advice'" in caplog.text


def test_nothing_measured_is_said_once(caplog):
    model = nn.Linear(2, 2)
    monitor = AttentionStabilityMonitor(model, log_every=1)
    for _ in range(3):
        model(torch.zeros(1, 2))
        assert monitor.on_step() is None
    assert len(ours(caplog)) == 1 and "nothing measured yet" in caplog.text


def test_a_log_step_without_a_forward_does_not_stop_later_ones(model, train_step, caplog):
    monitor = AttentionStabilityMonitor(model, log_every=1)
    train_step(model)
    assert monitor.on_step() is not None
    assert monitor.on_step() is None
    train_step(model)
    assert monitor.on_step().step == 3
    assert len(ours(caplog)) == 1


def test_non_finite_weights_are_reported_and_do_not_stop_the_run(model, optimizer):
    monitor = AttentionStabilityMonitor(model, log_every=1)
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[0, 0] = torch.nan  # a query weight of head 0
    model(TOKENS)
    diagnosis = monitor.on_step()
    broken = {(i.layer, i.head) for i in diagnosis.issues if i.issue_type == "non_finite"}
    assert broken == {(LAYERS[1], 0)}
    intervention = monitor.get_intervention(diagnosis)
    assert intervention["action"] == "reduce_lr" and "restore the last checkpoint" in intervention["reason"]
    apply_intervention(optimizer, intervention)


# auto_intervene


def test_auto_intervene_clips_and_leaves_the_rate_to_the_user(model, optimizer, caplog):
    heat(model)
    model.eval()  # without dropout, so that the second forward sees the same inputs
    monitor = AttentionStabilityMonitor(model, log_every=1, auto_intervene=True)
    with torch.no_grad():
        model(TOKENS)
        diagnosis = monitor.on_step()
        (applied,) = monitor.applied
        assert applied.intervention["action"] == "qk_clip" and "intervened at step 1" in caplog.text
        rest = monitor.get_intervention(diagnosis)
        assert rest["action"] == "reduce_lr" and rest["factor"] == 0.5
        apply_intervention(optimizer, rest)
        model(TOKENS)
        after = monitor.on_step()
    top = [max(d.stats[name].max_abs_logit.max() for name in LAYERS) for d in (diagnosis, after)]
    assert top[0] > 1000 and top[1] < 60
    assert after.stats[LAYERS[0]].max_abs_logit.max() == pytest.approx(30.0, rel=1e-4)


def test_auto_intervene_without_need(model, train_step):
    monitor = AttentionStabilityMonitor(model, log_every=1, auto_intervene=True)
    train_step(model)
    assert monitor.get_intervention(monitor.on_step()) is None and not monitor.applied


def test_auto_intervene_that_fails_does_not_stop_the_run(model, train_step, caplog, monkeypatch):
    heat(model)
    monkeypatch.setattr(hnf_attention.monitoring.treatment, "apply_intervention", fail)
    monitor = AttentionStabilityMonitor(model, log_every=1, auto_intervene=True)
    for _ in range(2):
        train_step(model)
        assert monitor.on_step() is not None
    assert "'auto_intervene'" in caplog.text and not monitor.applied


def test_auto_intervene_is_refused_in_a_process_group(model, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    with pytest.raises(ValueError, match="expected auto_intervene=False, or ranks="):
        AttentionStabilityMonitor(model, auto_intervene=True, ranks=None)
    AttentionStabilityMonitor(model, ranks=None).restore()


# Beginning and end


def test_restore_ends_it_quietly(model, train_step, caplog):
    with AttentionStabilityMonitor(model, log_every=1) as monitor:
        train_step(model)
        assert monitor.on_step() is not None
    train_step(model)
    assert monitor.on_step() is None and not ours(caplog)
    AttentionStabilityMonitor(model).restore()  # would be refused were the model still instrumented


def test_dropping_it_ends_it(model):
    AttentionStabilityMonitor(model)
    AttentionStabilityMonitor(model).restore()


@pytest.mark.parametrize(
    "options, error",
    [
        ({"log_every": 0}, ValueError),
        ({"log_every": 2.5}, ValueError),
        ({"record_every": 0}, ValueError),
        ({"step": -1}, ValueError),
        ({"writers": [3]}, TypeError),
    ],
)
def test_bad_arguments_leave_the_model_as_it_was(model, options, error):
    with pytest.raises(error, match="expected"):
        AttentionStabilityMonitor(model, **options)
    AttentionStabilityMonitor(model).restore()


def test_it_is_printed_short(model, train_step, monkeypatch):
    monitor = AttentionStabilityMonitor(model, log_every=2, writers=[fail])
    for _ in range(4):
        train_step(model)
        monitor.on_step()
    assert repr(monitor) == (
        "AttentionStabilityMonitor of GPT2LMHeadModel at step 4: log_every 2, record_every None, "
        "2 snapshots, 0 interventions applied; off: writer 0 (function)"
    )
