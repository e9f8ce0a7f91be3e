"""Cadence, packing and resetting of the recorder, with a stand-in for an instrumentation."""

import gc
import weakref

import numpy as np
import pytest
import torch
from heads import FakeInstrumentation, checked, folded, queries_and_keys
from torch.utils._python_dispatch import TorchDispatchMode

from hnf_attention import attention_stats
from hnf_attention.engine import fold
from hnf_attention.monitoring.recorder import NothingMeasured, Recorder
from hnf_attention.statistics.fields import NUM_FOLDED
from hnf_attention.statistics.heads import HeadStats


@pytest.fixture
def fake():
    return FakeInstrumentation()


@pytest.mark.parametrize(
    "log_every, record_every, measured",
    [
        (4, None, {4, 8, 12}),
        (4, 1, set(range(1, 13))),
        (4, 3, {3, 4, 6, 8, 9, 12}),
        (1, None, set(range(1, 13))),
        (5, 4, {4, 5, 8, 10, 12}),
    ],
)
def test_cadence(fake, log_every, record_every, measured):
    recorder = Recorder(fake, log_every, record_every)
    call = queries_and_keys()
    seen, logged = set(), set()
    for step in range(1, 13):
        if fake.measuring:
            seen.add(step)
        fake.run("a", *call)
        snapshot = recorder.advance()
        assert recorder.step == step
        if snapshot is not None:
            logged.add(step)
            assert snapshot.step == step
            since = {s for s in measured if step - log_every < s <= step}
            assert snapshot.layers["a"].rows[0] == 20 * len(since)
    assert seen == measured
    assert logged == {s for s in range(1, 13) if s % log_every == 0}


def test_a_snapshot_is_the_fold_of_the_calls_since_the_last(fake):
    recorder = Recorder(fake, 2, 1)
    calls = [queries_and_keys(seed=seed, scale=1 + seed) for seed in range(4)]
    for index, call in enumerate(calls):
        fake.run("a", *call)
        fake.run("b", *calls[-1 - index])
        recorder.advance()
    first, second = recorder.history
    assert list(first.layers) == ["a", "b"]
    np.testing.assert_array_equal(first.layers["a"].values, folded(*calls[:2]))
    np.testing.assert_array_equal(second.layers["a"].values, folded(*calls[2:]))
    np.testing.assert_array_equal(first.layers["b"].values, folded(calls[3], calls[2]))
    np.testing.assert_array_equal(second.layers["b"].values, folded(calls[1], calls[0]))
    assert (first.layers["a"].head_dim, first.layers["a"].dtype) == (8, "float32")


def test_a_snapshot_does_not_change_afterwards(fake):
    recorder = Recorder(fake, 1)
    fake.run("only", *queries_and_keys())
    snapshot = recorder.advance()
    before = snapshot.layers["only"].values.copy()
    fake.run("only", *queries_and_keys(seed=5, scale=9.0))
    recorder.advance()
    np.testing.assert_array_equal(snapshot.layers["only"].values, before)


def test_layers_of_different_width_in_the_order_they_first_ran(fake):
    recorder = Recorder(fake, 1)
    calls = {"z": queries_and_keys(heads=3), "a": queries_and_keys(heads=1), "m": queries_and_keys(heads=5)}
    for layer, call in calls.items():
        fake.run(layer, *call)
    layers = recorder.advance().layers
    assert list(layers) == ["z", "a", "m"]
    for layer, call in calls.items():
        np.testing.assert_array_equal(layers[layer].values, folded(call))


def test_a_layer_that_did_not_run_is_not_in_the_snapshot(fake):
    recorder = Recorder(fake, 1)
    fake.run("a", *queries_and_keys())
    fake.run("b", *queries_and_keys())
    recorder.advance()
    fake.run("b", *queries_and_keys())
    assert list(recorder.advance().layers) == ["b"]


def test_other_shapes_and_dtypes_under_one_name_are_kept_apart(fake):
    recorder = Recorder(fake, 2, 1)
    wide, narrow = queries_and_keys(heads=4), queries_and_keys(heads=2)
    half = queries_and_keys(heads=4, dtype=torch.bfloat16)
    for _ in range(2):
        for call in (wide, narrow, half):
            fake.run("a", *call)
        recorder.advance()
    layers = recorder.history[-1].layers
    assert list(layers) == ["a", "a [2 heads of 8, float32]", "a [4 heads of 8, bfloat16]"]
    np.testing.assert_array_equal(layers["a"].values, folded(wide, wide))
    assert layers["a [2 heads of 8, float32]"].num_heads == 2
    assert layers["a [4 heads of 8, bfloat16]"].dtype == "bfloat16"


class HostCopies(TorchDispatchMode):
    """Every operation that would wait for a device, had the tensors been on one."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waiting = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "item")
        if any(name in func.__name__ for name in waiting):
            self.waits.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_no_operation_waits_for_the_device_between_log_steps(fake):
    recorder = Recorder(fake, 100, 1)
    call = queries_and_keys()
    fake.run("a", *call)
    with HostCopies() as copies:
        for _ in range(5):
            fake.run("a", *call)
            recorder.advance()
    assert copies.waits == []


def test_one_copy_at_a_log_step(fake, monkeypatch):
    recorder = Recorder(fake, 1)
    for layer in "abc":
        fake.run(layer, *queries_and_keys())
    sizes = []
    copy = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: sizes.append(tensor.numel()) or copy(tensor))
    layers = recorder.advance().layers
    assert sizes == [NUM_FOLDED * sum(stats.num_heads for stats in layers.values())]


def test_measuring_in_inference_mode_and_outside_of_it(fake):
    recorder = Recorder(fake, 1)
    call = queries_and_keys()
    with torch.inference_mode():
        fake.run("a", *call)
    fake.run("a", *call)
    with torch.inference_mode():
        stats = recorder.advance().layers["a"]
    np.testing.assert_array_equal(stats.values, folded(call, call))
    fake.run("a", *call)
    np.testing.assert_array_equal(recorder.advance().layers["a"].values, folded(call))


def test_nothing_ever_measured_tells_the_coverage(fake):
    recorder = Recorder(fake, 1)
    with pytest.raises(NothingMeasured, match="h.0.attn +never ran"):
        recorder.advance()
    assert recorder.step == 1 and not recorder.history
    fake.run("a", *queries_and_keys())
    assert recorder.advance().step == 2


def test_no_forward_since_the_last_snapshot(fake):
    recorder = Recorder(fake, 1)
    fake.run("a", *queries_and_keys())
    recorder.advance()
    with pytest.raises(NothingMeasured, match="before step 2 is read, got none since the snapshot at step 1"):
        recorder.advance()


def test_what_a_captured_graph_folds_when_it_replays_is_read(fake):
    recorder = Recorder(fake, 1)
    call = queries_and_keys()
    fake.run("a", *call)
    recorder.advance()
    (lane,) = recorder._lanes._lanes
    for accumulator in lane.working.values():  # a replay runs no Python
        fold.fold(accumulator, *call, attention_stats(*call), checked(*call))
    np.testing.assert_array_equal(recorder.advance().layers["a"].values, folded(call))


def test_stopped_it_counts_on_and_measures_no_more(fake):
    recorder = Recorder(fake, 10, 1)
    recorder.stop()
    for _ in range(3):
        assert not fake.measuring
        assert recorder.advance() is None
    assert not fake.measuring and recorder.step == 3


def test_no_reference_cycle(fake):
    recorder = Recorder(fake, 1)
    gone = weakref.ref(recorder)
    gc.disable()
    try:
        del recorder
        assert gone() is None
    finally:
        gc.enable()
    fake.run("a", *queries_and_keys())  # nobody is listening, nothing breaks


@pytest.mark.parametrize("log_every", [0, -1, 2.0, True, "10", None])
def test_bad_log_every(fake, log_every):
    with pytest.raises(ValueError, match="expected log_every to be an int >= 1, got"):
        Recorder(fake, log_every)


@pytest.mark.parametrize("record_every", [0, -1, 1.5, False, "1"])
def test_bad_record_every(fake, record_every):
    with pytest.raises(ValueError, match="expected record_every to be None or an int >= 1, got"):
        Recorder(fake, 10, record_every)


@pytest.mark.gpu
def test_on_the_gpu_without_synchronisation(fake):
    call = [x.cuda() for x in queries_and_keys()]
    recorder = Recorder(fake, 3, 1)
    fake.run("a", *call)  # compiles the kernels
    recorder.advance()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fake.run("a", *call)
        recorder.advance()
        fake.run("a", *call)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stats = recorder.advance().layers["a"]
    assert isinstance(stats, HeadStats) and stats.rows[0] == 60
