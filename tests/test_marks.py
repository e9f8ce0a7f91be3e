"""Marks: what the steps between two snapshots showed, and readings before their time."""

import numpy as np
import pytest
import torch
from heads import snapshot
from odd_layers import Fused
from torch import nn

from hnf_attention import AttentionStabilityMonitor
from hnf_attention.diagnosis import diagnose
from hnf_attention.diagnosis.ahead import MOST_EARLY, Watch, urgency, urgency_of_marks
from hnf_attention.diagnosis.heads import concatenate_heads
from hnf_attention.statistics.heads import Mark, Snapshot

X = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(0))


def size(step):
    """Of scores whose square root grows by 0.1 a step, nats."""
    return (2 + 0.1 * step) ** 2


def marks(steps, **layers):
    """Marks with the ranges of scores of these sizes: layer to the size at a step."""
    return tuple(
        Mark(s, {name: np.full(4, 2.0 * np.float64(of(s))) for name, of in layers.items()}) for s in steps
    )


def with_marks(snap, found):
    return Snapshot(snap.step, snap.layers, marks=found)


def line(history, marks=True):
    (heads,) = concatenate_heads(history, history[-1].layers, marks)
    return heads.root_score


def test_a_first_snapshot_with_marks_has_a_trend():
    alone = snapshot(100, a={"max_logit": size(100)})
    assert np.isnan(line([alone]).slope).all()
    found = line([with_marks(alone, marks(range(40, 100, 10), a=size))])
    assert found.slope == pytest.approx([0.1] * 4) and found.level == pytest.approx([12.0] * 4)
    assert (found.span == 50).all()  # those of the trend window
    # A mark is of some rows. It asks for a reading, and proves nothing.
    assert np.isnan(line([with_marks(alone, marks(range(40, 100, 10), a=size))], marks=False).slope).all()


def test_rare_rows_with_larger_scores_are_no_growth():
    """A run in which nothing changes: a mark shows a rare row now and then, and each reading shows one."""
    chance, history, watch, found, early = np.random.default_rng(0), [], Watch(), [], 0
    for log_step in range(100, 3100, 100):
        taken = []
        for step in range(log_step - 90, log_step, 10):
            seen = 60.0 if taken or chance.random() < 0.15 else 22.0
            taken += marks([step], a=lambda _, seen=seen: seen) if seen > 22 or not taken else ()
            if taken and watch.urgent(history, tuple(taken)):
                early += 1
                history.append(with_marks(snapshot(step + 1, a={"max_logit": 60.0}), tuple(taken)))
                found.append(urgency(history))
                taken = []
        watch.restart()
        history.append(with_marks(snapshot(log_step, a={"max_logit": 60.0}), tuple(taken)))
        found.append(urgency(history))
    assert set(found) == {0} and early <= 30 * MOST_EARLY


@pytest.mark.parametrize("every", [50, 100, 1000])
def test_the_trend_is_that_of_a_run_that_is_read_often(every):
    often = [snapshot(s, a={"max_logit": size(s)}) for s in range(10, 2010, 10)]
    seldom = [
        with_marks(often[s // 10 - 1], marks(range(s - every + 10, s, 10)[-6:], a=size))
        for s in range(every, 2010, every)
    ]
    assert line(seldom).slope == pytest.approx(line(often).slope)
    if every <= 100:
        assert diagnose(seldom).issues[0].evidence == diagnose(often).issues[0].evidence


def test_a_bias_in_the_scores_is_no_trend():
    hidden = {"max_logit": 5.0, "min_logit": -1e4, "score_kind": 1.0, "query_size": 1.0, "key_size": 1.0}
    found = with_marks(snapshot(100, a=hidden), marks(range(40, 100, 10), a=lambda s: 100.0 * s))
    assert np.isnan(line([found]).slope).all() and not diagnose([found]).has_issues()


def test_marks_of_other_heads_are_passed_over():
    found = with_marks(snapshot(100, a={"max_logit": 5.0}), marks(range(40, 100, 10), b=size))
    other = Mark(90, {"a": np.ones(3)})
    assert np.isnan(line([found]).slope).all()
    assert np.isnan(line([with_marks(found, (other,))]).slope).all()


def test_how_urgent_scores_are():
    steady = [snapshot(100, a={"max_logit": 5.0}, b={"max_logit": 5.0})]
    assert urgency(steady) == 0
    grown = dict(a=size, b=lambda s: 5.0)
    assert urgency_of_marks(steady, marks((110, 120), **grown)) == 1  # scores of 170 nats in the first layer
    assert urgency_of_marks(steady, marks((110,), a=lambda s: 6.0, b=lambda s: 6.0)) == 0
    assert urgency_of_marks([], marks((10, 20, 30, 40), a=lambda s: s * s / 10, b=lambda s: s * s / 10)) == 2


class Run:
    """Two layers whose scores grow by a factor a step."""

    def __init__(self, growth, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(Fused(), Fused())
        self.growth = growth
        self.monitor = AttentionStabilityMonitor(self.model, **options)

    def until(self, last):
        """The diagnoses up to a step."""
        found = []
        while self.monitor.step < last:
            self.model(X).square().mean().backward()
            with torch.no_grad():
                for layer in self.model:
                    layer.qkv.weight[:64] *= self.growth
            found.append(self.monitor.on_step())
        return [diagnosis for diagnosis in found if diagnosis is not None]


def first(diagnoses, errors):
    return next(d.step for d in diagnoses if (d.errors if errors else d.has_issues()))


@pytest.mark.slow
def test_first_warnings_and_errors_come_at_like_steps_at_any_cadence():
    found = {every: Run(1.035, log_every=every).until(100) for every in (1, 10, 100)}
    for errors in (False, True):
        steps = [first(diagnoses, errors) for diagnoses in found.values()]
        assert max(steps) - min(steps) <= 30, (errors, steps)
    assert len(found[100]) <= 1 + MOST_EARLY


@pytest.mark.parametrize("options", [{"every_step": False}, {"log_every": 10}])
def test_without_marks_the_log_steps_are_those_that_were_asked_for(options):
    run = Run(1.035, **{"log_every": 50, **options})
    every = run.monitor._recorder.cadence.log_every
    assert [d.step for d in run.until(60)] == list(range(every, 61, every))
    assert not any(shot.marks for shot in run.monitor.history)


@pytest.mark.slow
def test_a_steady_run_is_read_at_its_log_steps_and_holds_the_latest_marks():
    run = Run(1.0, log_every=100)
    assert [d.step for d in run.until(200)] == [100, 200]
    latest = run.monitor.history[-1].marks
    assert [mark.step for mark in latest] == [140, 150, 160, 170, 180, 190]
    assert list(latest[0].ranges) == ["0", "1"]
    measured = run.monitor.history[-1].layers["0"]
    assert latest[-1].ranges["0"] == pytest.approx(measured.between_logit_range)


def test_a_fault_in_the_marks_leaves_the_log_steps(monkeypatch):
    run = Run(1.035, log_every=20)
    monkeypatch.setattr(run.monitor._recorder._marks, "take", lambda step: 1 / 0)
    assert [d.step for d in run.until(40)] == [20, 40]
    assert "ZeroDivisionError" in run.monitor.status.off["marks"].reason


@pytest.mark.gpu
def test_on_a_card_the_host_does_not_wait_for_a_mark():
    torch.manual_seed(0)
    model, x = nn.Sequential(Fused(), Fused()).cuda(), X.cuda()
    with AttentionStabilityMonitor(model, log_every=100) as monitor:
        for step in range(1, 100):
            model(x).square().mean().backward()
            if step > 20:  # pinned memory is there by then
                torch.cuda.set_sync_debug_mode("error")
            try:
                monitor.on_step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        model(x).square().mean().backward()
        monitor.on_step()
        assert [mark.step for mark in monitor.history[-1].marks] == [40, 50, 60, 70, 80, 90]
