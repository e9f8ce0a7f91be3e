"""A fault in each stage of the monitor: training goes on bit for bit, the log is whole, and one line says so."""

import signal

import pytest
import torch
from faults import STAGES, FaultInjector, Model, train

from hnf_attention import AttentionStabilityMonitor, errors
from hnf_attention.instrumentation import observer
from hnf_attention.run_log import RunLog, RunLogWriter

pytestmark = pytest.mark.usefixtures("nothing_reported")

#: Without these there is no snapshot of the log step.
MEASURING = ("find", "describe", "probe", "context", "deliver", "fold", "lane")
#: After these the numbers of the log step are part of the next snapshot.
READING = ("settle", "copy", "reset", "cadence")
#: Steps between log steps, which these are of.
BETWEEN = (
    *("repeats", "find keeper", "in short", "expect", "take", "keep", "hand on", "extremes"),
    *("forward begins", "forward ends"),
)
#: Of the thread that writes.
OF_THE_THREAD = ("record", "disk", "shrink")
#: Log steps at which these may be missing in the run log.
OTHERS = {"history": [2, 6, 8], "accumulator": [4, 6, 8]}


@pytest.fixture
def nothing_reported(monkeypatch):
    monkeypatch.setattr(errors, "_reported", set())


@pytest.fixture(scope="module")
def plain():
    return train(monitored=False)


@pytest.fixture(scope="module")
def plain_and_sharp():
    return train(monitored=False, sharp=60.0)


def run_with(tmp_path, injector, **options):
    """The run, and the log steps of its run log."""
    path = tmp_path / "run.db"
    out = RunLogWriter(path)
    with injector:
        run = train(injector=injector, writers=[out], **options)
        out.close()
    with RunLog(path) as log:
        return run, log.steps.tolist()


def failures(run):
    """The lines that say a fault, without those that say what came of it."""
    return [line for line in run.said if "works again" not in line and "nothing to report" not in line]


def check_stage(stage, step, error, tmp_path, plain):
    injector = FaultInjector().fail(stage, step, error)
    run, steps = run_with(tmp_path, injector, states=stage == "good states")
    assert injector.raised[stage], "the stage was not reached"
    assert run.error is None and run.same_as(plain)
    assert len(failures(run)) <= 1 + (stage in TWICE), run.said
    expected = [2, 4, 6, 8]
    if stage in (*MEASURING, *READING) and step in expected:
        expected.remove(step)
    assert steps == OTHERS.get(stage, expected)


#: A first keeping step teaches what to expect; from then on other functions run.
FIRST = {"find keeper": 1, "keep": 1}
#: One of each kind.
QUICK = ("find", "fold", "take", "hand on", "copy", "rule", "run log")


def stages():
    apart = (*OF_THE_THREAD, "marks", "proposal", "intervention", "release")
    for stage in STAGES:
        if stage not in apart:
            step = 3 if stage in BETWEEN else 2 if stage == "accumulator" else 4
            yield pytest.param(
                stage, FIRST.get(stage, step), marks=() if stage in QUICK else pytest.mark.slow, id=stage
            )


@pytest.mark.parametrize(("stage", "step"), list(stages()))
def test_training_goes_on_after_a_fault(stage, step, tmp_path, plain):
    check_stage(stage, step, None, tmp_path, plain)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError("none left"),
        ValueError("a number"),
        AssertionError(),
        OverflowError("too large"),
        RecursionError("too deep"),
        KeyError("layers.0"),
        StopIteration(),
        OSError(28, "No space left on device"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize(("stage", "step"), list(stages()))
def test_whatever_the_fault_is(stage, step, error, tmp_path, plain):
    check_stage(stage, step, error, tmp_path, plain)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [*BETWEEN, *MEASURING, "cadence", "rule", "logging"])
def test_a_fault_of_every_step_is_said_once(stage, tmp_path, plain):
    injector = FaultInjector()
    for step in range(1, 9):
        injector.fail(stage, step)
    run, _ = run_with(tmp_path, injector)
    assert injector.raised[stage] > 1 or stage in ("find keeper", "keep")
    assert run.error is None and run.same_as(plain)
    assert len(failures(run)) == (stage not in SILENT) + (stage in TWICE), run.said


#: Noted in the coverage alone, where it says of each layer what is missing.
SILENT = ("in short", "keep", "extremes")
#: Two parts use it, or it says what is lost as well.
TWICE = ("lane", "notes")


@pytest.mark.slow
@pytest.mark.parametrize("stage", OF_THE_THREAD)
def test_a_fault_of_every_step_of_the_thread_that_writes_is_said_once(stage, tmp_path, plain):
    injector = FaultInjector().fail(stage)
    run, steps = run_with(tmp_path, injector)
    assert injector.raised[stage] and run.error is None and run.same_as(plain)
    assert len(failures(run)) == 1 and steps == ([2, 4, 6, 8] if stage == "shrink" else [])


@pytest.mark.slow
def test_a_failed_copy_loses_no_row(tmp_path):
    injector = FaultInjector().fail("copy", 4)
    with injector:
        seen = []
        train(injector=injector, writers=[seen.append])
    assert [x.step for x in seen] == [2, 6, 8]
    assert [x.history[-1].forwards.training for x in seen] == [1, 2, 1]
    rows = [int(x.stats["layers.0"].rows[0]) for x in seen]
    assert rows == [24, 48, 24]


@pytest.mark.slow
def test_numbers_are_written_though_they_cannot_be_judged(tmp_path):
    injector, seen = FaultInjector().fail("diagnosis", 4), []
    with injector:
        run = train(injector=injector, writers=[seen.append])
    at_4 = seen[1]
    assert at_4.step == 4 and at_4.stats and not at_4.issues
    assert at_4.not_judged == {"all": "RuntimeError: a fault in 'diagnosis'"}
    assert at_4.healthy is None and "not judged" in at_4.summary()
    assert not seen[2].not_judged and run.error is None


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "rule"), [("rule", "overflow_risk"), ("rule of the model", "non_finite")])
def test_one_failing_rule_leaves_the_others(stage, rule, tmp_path):
    plain, seen = [], []
    train(sharp=60.0, writers=[plain.append])
    with FaultInjector().fail(stage) as injector:
        run = train(injector=injector, sharp=60.0, writers=[seen.append])
    assert [list(x.not_judged) for x in seen] == [[rule]] * 4
    kept = [issue for issue in plain[-1].issues if issue.issue_type != rule]
    assert plain[-1].issues and [repr(x) for x in seen[-1].issues] == [repr(x) for x in kept]
    assert f"rule {rule}" in run.off and seen[-1].healthy is not True


@pytest.mark.slow
def test_an_issue_is_not_gone_because_its_rule_failed():
    injector, out = FaultInjector(), []
    for step in range(5, 17):
        injector.fail("rule", step)
    with injector:
        run = train(16, injector, sharp=60.0, writers=[out.append])
    assert out[0].issues and not [line for line in run.said if "gone" in line]


@pytest.mark.slow
def test_a_coverage_that_cannot_be_read_is_not_taken_for_a_whole_one():
    seen = []
    with FaultInjector().fail("coverage", 4) as injector:
        train(injector=injector, writers=[seen.append])
    assert seen[1].not_measured == {"": "what was not measured could not be listed"}
    assert seen[1].healthy is None and not seen[2].not_measured


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["proposal", "intervention"])
def test_an_intervention_that_fails_changes_no_weight(stage, plain_and_sharp, tmp_path):
    injector = FaultInjector().fail(stage)
    run, steps = run_with(tmp_path, injector, sharp=60.0, auto_intervene=True)
    assert injector.raised[stage] and run.error is None
    assert run.same_as(plain_and_sharp) and steps == [2, 4, 6, 8]
    assert "auto_intervene" in run.off


@pytest.mark.slow
def test_marks_that_fail_end_nothing(tmp_path):
    plain = train(40, monitored=False)
    injector = FaultInjector().fail("marks")
    run, steps = run_with(tmp_path, injector, steps=40, log_every=40)
    assert injector.raised["marks"] and run.same_as(plain) and steps == [40]
    assert len(failures(run)) == 1


@pytest.mark.slow
def test_a_function_that_cannot_be_put_back_keeps_no_other_one(tmp_path, plain):
    original = torch.nn.functional.scaled_dot_product_attention
    injector = FaultInjector()
    with injector.fail("release", 99):
        model = Model()
        watching = AttentionStabilityMonitor(model, writers=[out := RunLogWriter(tmp_path / "run.db")])
        stuck = watching.instrumentation._patches[0]  # the last one that is released
        injector.step = 99
        released = [patch for patch in watching.instrumentation._patches if patch is not stuck]
        watching.restore()
        injector.step = 0
        assert injector.raised["release"] > 1
        assert not out._running  # the run log was closed
        for patch in [*released, stuck]:
            patch.release()
        for patch in watching.instrumentation._watched._patches:
            patch.release()
    assert not observer.active and not observer.keeping
    assert torch.nn.functional.scaled_dot_product_attention is original


# What the run itself does


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 4])
def test_a_forward_that_raises_half_way_raises_the_same(step, tmp_path):
    def breaks(model, now):
        if now == step:
            model.layers[1].raises = ZeroDivisionError("of the model")

    plain = train(monitored=False, before_step=breaks)
    run, steps = run_with(tmp_path, FaultInjector(), before_step=breaks)
    assert type(run.error) is ZeroDivisionError and run.error.__context__ is None
    assert run.same_as(plain) and not run.said
    assert steps == [2]


@pytest.mark.slow
def test_a_forward_that_raises_and_is_tried_again_counts_once():
    seen = []
    model = Model()
    with AttentionStabilityMonitor(model, log_every=1, writers=[seen.append]) as watching:
        model.layers[1].raises = torch.OutOfMemoryError("of the model")
        x = torch.randn(2, 12, 16)
        with pytest.raises(torch.OutOfMemoryError):
            model(x)
        model(x)
        watching.on_step()
    assert [int(stats.rows[0]) for stats in seen[0].stats.values()] == [24, 24]
    assert seen[0].history[-1].forwards == (1, 0, 1)


@pytest.mark.slow
def test_a_nan_loss_changes_nothing_and_is_kept(tmp_path):
    def poison(model, step):
        if step == 5:
            with torch.no_grad():
                model.layers[0].qkv.weight[3] = torch.nan

    plain = train(monitored=False, before_step=poison)
    run, steps = run_with(tmp_path, FaultInjector(), before_step=poison)
    assert run.error is None and steps == [2, 4, 6, 8]
    same = [
        torch.equal(a.isnan(), b.isnan()) for a, b in zip(run.model.parameters(), plain.model.parameters())
    ]
    assert all(same)
    with RunLog(tmp_path / "run.db") as log:
        steps, values = log.scalars()["loss"]
        assert steps.tolist() == list(range(1, 9))
        assert values[4:].tolist() != values[4:].tolist()  # NaN
        assert log.issues[0]["issue_type"] == "non_finite"


@pytest.mark.slow
def test_a_model_that_is_edited_is_measured_as_it_is_now():
    def edit(model, step):
        if step == 3:
            model.layers[1] = Model(1).layers[0]
        if step == 5:
            model.layers.append(Model(1).layers[0])
        if step == 7:
            del model.layers[0]

    seen = []
    plain = train(monitored=False, before_step=edit)
    run = train(before_step=edit, writers=[seen.append])
    assert run.error is None and run.same_as(plain) and not run.said
    measured = [{name: int(stats.rows[0]) for name, stats in x.stats.items()} for x in seen]
    # A module that came later has no name of its own: its calls are those of the model.
    assert measured == [
        {"layers.0": 24, "layers.1": 24},
        {"layers.0": 24, "": 24},
        {"layers.0": 24, "": 48},
        {"": 48},
    ]
    assert observer.owner(run.model) is None


class TimeLimit(Exception):
    pass


@pytest.mark.parametrize(
    ("where", "form"),
    [
        ("copy", "function"),
        ("probe", "method"),
        ("rule", "hidden function"),
        *[
            pytest.param(where, "object", marks=pytest.mark.slow)
            for where in ("rule", "context", "find", "take", "run log", "hand on", "forward ends")
        ],
        *[
            pytest.param(where, "hidden function", marks=pytest.mark.slow)
            for where in ("copy", "probe", "context", "find", "take", "run log", "hand on", "forward ends")
        ],
    ],
)
def test_the_error_of_a_signal_handler_comes_out(where, form, tmp_path):
    """A time limit, or the notice before a machine is taken away, may come while the monitor works."""

    class Callable:
        def __call__(self, number, frame):
            raise TimeLimit

    class Handler(Callable):
        def method(self, number, frame):
            raise TimeLimit

    def function(number, frame):
        raise TimeLimit

    handler = {"function": function, "method": Handler().method, "object": Handler()}[form.split()[-1]]
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        injector = FaultInjector(hides=form.startswith("hidden"))
        injector.fail(where, 3 if where in BETWEEN else 4, signal.SIGUSR1)
        run, _ = run_with(tmp_path, injector)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert type(run.error) is TimeLimit
    assert not observer.active and not observer.thread.suspended
