"""What else a monitor takes: mode, thresholds, alerts, pauses, processes; and its state in a checkpoint."""

import json
import logging

import numpy as np
import pytest
import torch
from tiny_gpt2 import LAYERS, heat, tiny_gpt2
from torch import nn

from hnf_attention import AttentionAnalyzer, AttentionStabilityMonitor
from hnf_attention.diagnosis import diagnose
from hnf_attention.monitoring import writers

TOKENS = torch.randint(0, 40, (4, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return tiny_gpt2()


def step(model, monitor):
    model(TOKENS)
    return monitor.on_step()


# Mode and thresholds


@pytest.mark.parametrize("make", [AttentionStabilityMonitor, AttentionAnalyzer])
def test_probing_is_the_default_and_leaves_every_bit(model, make):
    model.eval()
    plain = model(TOKENS).logits
    with make(model) as watching:
        assert watching.instrumentation.mode == "probe"
        assert torch.equal(model(TOKENS).logits, plain)
    with make(model, mode="fused") as watching:
        assert watching.instrumentation.mode == "fused"
    with pytest.raises(ValueError, match="expected mode in .*, got 'fast'"):
        make(model, mode="fast")


@pytest.mark.parametrize("make", [AttentionStabilityMonitor, AttentionAnalyzer])
def test_thresholds_reach_the_rules_and_are_checked(model, make):
    options = {"log_every": 1} if make is AttentionStabilityMonitor else {}
    for thresholds, warned in [({"watch_logit": 1e-3, "clip_logit": 1e-3}, True), ({}, False)]:
        with make(model, thresholds=thresholds, **options) as watching:
            model(TOKENS)
            diagnosis = watching.on_step() if options else watching.diagnose()
        assert diagnosis.thresholds == thresholds and bool(diagnosis.warnings) == warned
    with pytest.raises(ValueError, match="expected the name of a threshold, got 'clip_logits'"):
        make(model, thresholds={"clip_logits": 50})


# Alerts


def test_alerts_are_the_issues_that_are_new_or_worse(model):
    alerts = []
    model.eval()
    monitor = AttentionStabilityMonitor(model, log_every=1, on_alert=alerts.append)
    step(model, monitor)
    assert alerts == []
    heat(model, 60.0)
    diagnosis = step(model, monitor)
    assert alerts == [diagnosis.issues] and diagnosis.issues
    step(model, monitor)
    assert len(alerts) == 1
    heat(model, 4.0)
    step(model, monitor)
    known = {(i.layer, i.head, i.issue_type, i.severity) for i in alerts[0]}
    assert alerts[1] and not known & {(i.layer, i.head, i.issue_type, i.severity) for i in alerts[1]}


def test_an_alert_that_fails_is_tried_again_and_stops_nothing(model, caplog):
    calls = []

    def alert(issues):
        calls.append(len(issues))
        raise ConnectionError("no network")

    heat(model, 60.0)
    monitor = AttentionStabilityMonitor(model, log_every=1, on_alert=alert)
    assert step(model, monitor).issues and monitor.status.off["on_alert"].again == 2
    heat(model, 4.0)
    assert step(model, monitor).issues and len(calls) == 2
    assert not monitor.status and "no network" in str(monitor.status)


def test_an_alert_has_to_be_callable(model):
    with pytest.raises(TypeError, match="expected on_alert to be None or a callable, got 3"):
        AttentionStabilityMonitor(model, on_alert=3)
    AttentionStabilityMonitor(model).restore()


def test_resolved_issues_are_logged_and_lines_are_short(model, caplog):
    caplog.set_level(logging.INFO, logger="hnf_attention")
    model.eval()
    monitor = AttentionStabilityMonitor(model, log_every=1)
    heat(model, 60.0)
    step(model, monitor)
    new = [record.getMessage() for record in caplog.records]
    heat(model, 1 / 60.0)
    caplog.clear()
    for _ in range(3):
        assert not caplog.records
        step(model, monitor)
    gone = [record.getMessage() for record in caplog.records]
    assert new and len(gone) == len(new) and all(x.startswith("resolved at step 4: ") for x in gone)
    assert all(len(line) <= 160 for line in [*new, *gone])


# Status


def test_a_writer_that_never_takes_one_snapshot_misses_that_one(model, caplog):
    seen = []

    def writer(diagnosis):
        if diagnosis.step == 4:
            raise OSError(28, "No space left on device")
        seen.append(diagnosis.step)

    monitor = AttentionStabilityMonitor(model, log_every=2, writers=[writer])
    for _ in range(20):
        status = monitor.status
        step(model, monitor)
    assert seen == [2, 6, 8, 10, 12, 14, 16, 18, 20]
    assert status and not status.off and str(status) == "all parts work"
    first, missed, second = [r.getMessage() for r in caplog.records]
    assert missed == "writer 0 (function) missed 1 of the log steps before"
    assert "'writer 0 (function)' failed at step 4; it is tried again at step 6" in first
    assert "'writer 0 (function)' works again at step 6, after 1 failure since step 4" in second


def test_a_writer_whose_disk_was_full_for_a_while_misses_nothing(model, caplog):
    seen = []

    def writer(diagnosis):
        if 4 <= monitor.step < 20:
            raise OSError(28, "No space left on device")
        seen.append(diagnosis.step)

    monitor = AttentionStabilityMonitor(model, log_every=2, writers=[writer])
    for _ in range(36):
        step(model, monitor)
    assert seen == list(range(2, 37, 2)) and monitor.status
    assert len(caplog.records) == 2 and "works again" in caplog.records[1].getMessage()


def test_what_waits_for_a_writer_has_a_bound(monkeypatch, model, caplog):
    monkeypatch.setattr(writers, "MOST_WAITING", 3)
    seen = []

    def writer(diagnosis):
        if monitor.step < 8:
            raise OSError
        seen.append(diagnosis.step)

    monitor = AttentionStabilityMonitor(model, log_every=1, writers=[writer])
    for _ in range(9):
        step(model, monitor)
    assert seen == [6, 7, 8, 9]
    assert "writer 0 (function) missed 5 of the log steps before" in caplog.text


def test_a_writer_that_never_works_is_asked_ever_more_rarely(model, caplog):
    tried = []

    def writer(diagnosis):
        tried.append(diagnosis.step)
        raise OSError

    monitor = AttentionStabilityMonitor(model, log_every=1, writers=[writer])
    for _ in range(40):
        step(model, monitor)
    assert tried == [1, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2] and len(caplog.records) == 1
    outage = monitor.status.off["writer 0 (function)"]
    assert (outage.since, outage.failures, outage.again) == (1, 6, 64)


def test_the_status_after_the_end(model):
    monitor = AttentionStabilityMonitor(model, log_every=1)
    step(model, monitor)
    monitor.restore()
    assert str(monitor.status) == ("recording: off since step 1: restore() was called; it is not tried again")
    assert step(model, monitor) is None


# Pauses


def test_an_evaluation_inside_a_pause_is_left_out(model):
    monitor = AttentionStabilityMonitor(model, log_every=1)
    model(TOKENS)
    with monitor.paused():
        model(TOKENS)
    assert (monitor.on_step().stats[LAYERS[0]].rows == 4 * 24).all()


# Processes


def test_ranks_that_mean_nothing_are_refused(model):
    with pytest.raises(TypeError, match="expected ranks to be 'auto', None or a ProcessGroups, got 'world'"):
        AttentionStabilityMonitor(model, ranks="world")
    AttentionStabilityMonitor(model, ranks=None).restore()


def test_wrappers_of_data_parallelism_do_not_show_in_names(model, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        with AttentionStabilityMonitor(parallel, log_every=1) as monitor:
            heat(model)
            diagnosis = step(parallel, monitor)
            assert list(diagnosis.stats) == LAYERS and monitor.model is model
            assert set(monitor.get_intervention(diagnosis)["layers"]) == set(LAYERS)
    finally:
        torch.distributed.destroy_process_group()


# State


def heated_run(model, monitor, count):
    return [
        None if diagnosis is None else diagnosis.to_dict()
        for diagnosis in (step(model, monitor) for _ in range(count))
    ]


@pytest.mark.parametrize("through", ["json", "torch"])
def test_a_run_that_resumes_goes_on_as_if_it_had_not_stopped(model, caplog, tmp_path, through):
    heat(model, 60.0)
    model.eval()
    with AttentionStabilityMonitor(model, log_every=2) as monitor:
        heated_run(model, monitor, 7)
        monitor.get_intervention(diagnose(monitor.history))
        saved = monitor.state_dict()
        if through == "json":
            saved = json.loads(json.dumps(saved))
        else:
            torch.save(saved, tmp_path / "state.pt")
            saved = torch.load(tmp_path / "state.pt", weights_only=True)
        expected = heated_run(model, monitor, 9)
    caplog.clear()
    with AttentionStabilityMonitor(model, log_every=2) as resumed:
        resumed.load_state_dict(saved)
        assert resumed.step == 7 and [each.step for each in resumed.history] == [2, 4, 6]
        assert resumed.instrumentation.measuring
        assert resumed._treatment.policy.state_dict() == saved["policy"]
        found = heated_run(model, resumed, 9)
    assert found == expected and any(found) and not caplog.records  # every issue was reported before


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("step"),
        lambda s: s.update(step=-1),
        lambda s: s.update(format=99),
        lambda s: s.update(history=[{}]),
        lambda s: s.update(policy={}),
        lambda s: s.update(repeated=None),
        lambda s: s.update(issues=[3]),
        lambda s: s.update(done=-1),
    ],
)
def test_a_state_that_is_none_is_refused_and_changes_nothing(model, change):
    monitor = AttentionStabilityMonitor(model, log_every=1)
    step(model, monitor)
    before, saved = monitor.state_dict(), monitor.state_dict()
    saved["step"], saved["policy"] = 7, saved["policy"] | {"clipping": not saved["policy"]["clipping"]}
    change(saved)
    for wrong in (saved, {}, 3):
        with pytest.raises(ValueError, match="expected a state_dict of a monitor"):
            monitor.load_state_dict(wrong)
    assert monitor.state_dict() == before and len(monitor.history) == 1


def test_a_state_that_comes_after_the_end_measures_nothing(model):
    monitor = AttentionStabilityMonitor(model, log_every=1)
    step(model, monitor)
    saved = monitor.state_dict()
    monitor.restore()
    monitor.load_state_dict(saved)
    assert not monitor.instrumentation.measuring and step(model, monitor) is None and monitor.step == 2


def test_a_state_of_other_statistics_leaves_the_history_out(model, caplog):
    monitor = AttentionStabilityMonitor(model, log_every=1)
    step(model, monitor)
    saved = monitor.state_dict() | {"fields": ["others"]}
    monitor.load_state_dict(saved)
    assert monitor.step == 1 and not monitor.history and "starts anew" in caplog.text
    assert step(model, monitor).step == 2


def test_the_history_takes_as_much_as_it_may(model):
    monitor = AttentionStabilityMonitor(model, log_every=1, history_bytes=40_000)
    for _ in range(30):
        step(model, monitor)
    assert 1 < len(monitor.history) < 30 and monitor.history.bytes <= 40_000
    assert np.all(np.diff([each.step for each in monitor.history]) > 0)
