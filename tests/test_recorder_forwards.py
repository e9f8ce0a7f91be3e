"""Which forwards a snapshot holds: training before evaluation, none that raised, every call of a layer by itself."""

import threading

import numpy as np
import pytest
import torch
from heads import FakeForward, FakeInstrumentation, folded, queries_and_keys

from hnf_attention.monitoring.recorder import NothingMeasured, Recorder
from hnf_attention.statistics.heads import Forwards, HeadStats, Snapshot

CALLS = [queries_and_keys(seed=seed, scale=1 + seed) for seed in range(6)]


@pytest.fixture
def fake():
    return FakeInstrumentation()


def holds(snapshot, **layers):
    assert list(snapshot.layers) == [name.replace("__", "#") for name in layers]
    for stats, calls in zip(snapshot.layers.values(), layers.values(), strict=True):
        np.testing.assert_array_equal(stats.values, folded(*calls))


# Training and evaluation


@pytest.mark.parametrize("training_first", [True, False])
def test_an_evaluation_is_left_out_of_a_training_snapshot(fake, training_first):
    recorder = Recorder(fake, 1)
    for training in (training_first, not training_first, False, True):
        fake.forward([("a", *CALLS[training])], training)
    snapshot = recorder.advance()
    holds(snapshot, a=[CALLS[1], CALLS[1]])
    assert snapshot.training and snapshot.forwards == Forwards(2, 2, 0)
    assert snapshot.holds == "2 training forwards (2 evaluation forwards left out)"
    assert "2 training forwards" in repr(snapshot)


def test_without_training_the_evaluation_is_held(fake):
    recorder = Recorder(fake, 1)
    fake.forward([("a", *CALLS[0])], training=False)
    snapshot = recorder.advance()
    holds(snapshot, a=[CALLS[0]])
    assert not snapshot.training and snapshot.holds == "1 evaluation forward"
    fake.forward([("a", *CALLS[1])])
    snapshot = recorder.advance()  # the evaluation before was read
    holds(snapshot, a=[CALLS[1]])
    assert snapshot.holds == "1 training forward"


def test_an_evaluation_in_another_dtype_takes_no_name_from_the_training(fake):
    recorder = Recorder(fake, 1)
    half = queries_and_keys(dtype=torch.bfloat16)
    fake.forward([("a", *half)], training=False)
    fake.forward([("a", *CALLS[0])])
    holds(recorder.advance(), a=[CALLS[0]])
    fake.forward([("a", *half)], training=False)
    assert recorder.advance().layers["a"].dtype == "bfloat16"


def test_calls_outside_of_any_known_forward_are_training(fake):
    recorder = Recorder(fake, 1)
    fake.run("a", *CALLS[0])
    fake.forward([("a", *CALLS[1])], training=False)
    snapshot = recorder.advance()
    holds(snapshot, a=[CALLS[0]])
    assert snapshot.holds == "training forwards (1 evaluation forward left out)"


def test_a_forward_whose_end_nobody_tells_is_kept_and_counted_once(fake):
    recorder = Recorder(fake, 1)
    part = FakeForward(7, training=False, ends=False)
    for call in CALLS[:3]:
        fake.run("a", *call, part)
    snapshot = recorder.advance()
    holds(snapshot, a=CALLS[:3])
    assert snapshot.holds == "1 evaluation forward"


def test_paused_leaves_calls_out_and_nests(fake):
    recorder = Recorder(fake, 2, 1)
    with recorder.paused():
        fake.run("a", *CALLS[0])
        with recorder.paused():
            fake.run("a", *CALLS[0])
        assert not fake.measuring
        recorder.advance()  # a step that ends inside does not end the pause
        assert not fake.measuring
    fake.run("a", *CALLS[1])
    holds(recorder.advance(), a=[CALLS[1]])


def test_paused_ends_with_an_exception(fake):
    recorder = Recorder(fake, 1)
    with pytest.raises(KeyError), recorder.paused():
        raise KeyError
    assert fake.measuring
    recorder.stop()
    with recorder.paused():
        pass
    assert not fake.measuring


# Forwards that raise


def test_a_forward_that_raised_and_was_tried_again_counts_once(fake):
    recorder = Recorder(fake, 1)
    fake.forward([("a", *CALLS[0]), ("b", *CALLS[1])])
    fake.forward([("a", *CALLS[5]), ("late", *CALLS[5])], failed=True)
    fake.forward([("a", *CALLS[2]), ("b", *CALLS[3])])
    snapshot = recorder.advance()
    holds(snapshot, a=[CALLS[0], CALLS[2]], b=[CALLS[1], CALLS[3]])
    assert snapshot.holds == "2 training forwards (1 failed forward left out)"


def test_a_failed_forward_alone_is_nothing(fake):
    recorder = Recorder(fake, 1)
    fake.forward([("a", *CALLS[0])], failed=True)
    assert not recorder.pending
    with pytest.raises(NothingMeasured):
        recorder.advance()
    fake.forward([("a", *CALLS[1])])
    assert recorder.pending
    holds(recorder.advance(), a=[CALLS[1]])
    assert not recorder.pending


def test_a_forward_that_failed_after_the_snapshot_drops_its_later_part(fake):
    recorder = Recorder(fake, 1)
    forward = FakeForward()
    fake.run("a", *CALLS[0], forward)
    holds(recorder.advance(), a=[CALLS[0]])  # read inside of the forward, in its thread
    fake.run("a", *CALLS[1], forward)
    forward.failed = True
    fake.on_forward_end(forward)
    fake.forward([("a", *CALLS[2])])
    holds(recorder.advance(), a=[CALLS[2]])


def test_a_forward_that_was_never_ended_gives_way_to_the_next_in_its_thread(fake):
    recorder = Recorder(fake, 1)
    fake.run("a", *CALLS[0], FakeForward(1))
    fake.run("a", *CALLS[1], FakeForward(2))
    assert len(recorder._lanes._lanes) == 1
    holds(recorder.advance(), a=CALLS[:2])


def test_keeping_a_forward_waits_for_no_device_and_copies_once(fake, monkeypatch):
    copies = []
    together = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *pair: copies.append(len(pair[0])) or together(*pair))
    recorder = Recorder(fake, 100, 1)
    fake.forward([(name, *CALLS[0]) for name in "abc"])
    assert copies == [3] and recorder.pending


# Calls of one layer


def test_calls_of_a_shared_module_have_names_of_their_own_from_the_first_repetition_on(fake):
    recorder = Recorder(fake, 1)
    fake.forward([("block", *CALLS[0])])
    holds(recorder.advance(), block=[CALLS[0]])
    for _ in range(2):
        fake.forward([("block", *CALLS[i], i) for i in range(4)] + [("head", *CALLS[4])])
    holds(
        recorder.advance(),
        block__0=[CALLS[0]] * 2,
        block__1=[CALLS[1]] * 2,
        block__2=[CALLS[2]] * 2,
        block__3=[CALLS[3]] * 2,
        head=[CALLS[4]] * 2,
    )
    fake.forward([("block", *CALLS[5])])
    holds(recorder.advance(), block__0=[CALLS[5]])


def test_a_call_with_other_shapes_is_marked_only_beside_calls_of_its_own_number(fake):
    recorder = Recorder(fake, 1)
    wide = queries_and_keys(heads=4)
    fake.forward([("a", *CALLS[0], 0), ("a", *wide, 1)])
    fake.forward([("a", *wide, 0)])
    layers = recorder.advance().layers
    assert list(layers) == ["a#0", "a#1", "a#0 [4 heads of 8, float32]"]


# Threads


def test_threads_that_start_together_lose_no_row(fake):
    recorder = Recorder(fake, 1)
    gate = threading.Barrier(4)

    def work():
        gate.wait()
        for number in range(8):
            fake.forward([(name, *CALLS[0]) for name in "ab"], failed=number % 4 == 3)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    snapshot = recorder.advance()
    assert {name: stats.rows[0] for name, stats in snapshot.layers.items()} == dict.fromkeys("ab", 4 * 6 * 20)
    assert snapshot.forwards == Forwards(24, 0, 8)


def test_another_threads_running_forward_belongs_to_the_next_snapshot(fake):
    recorder = Recorder(fake, 1)
    begun, go_on = threading.Event(), threading.Event()

    def work():
        forward = FakeForward(9)
        fake.run("a", *CALLS[0], forward)
        begun.set()
        go_on.wait(10)
        fake.run("a", *CALLS[1], forward)
        forward.failed = False
        fake.on_forward_end(forward)

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait(10)
    fake.forward([("a", *CALLS[2])])
    holds(recorder.advance(), a=[CALLS[2]])
    go_on.set()
    thread.join()
    holds(recorder.advance(), a=CALLS[:2])


# What a snapshot says of itself


@pytest.mark.parametrize(
    "training, forwards, text",
    [
        (True, Forwards(1, 0, 0), "1 training forward"),
        (
            True,
            Forwards(3, 1, 2),
            "3 training forwards (1 evaluation forward and 2 failed forwards left out)",
        ),
        (False, Forwards(0, 4, 0), "4 evaluation forwards"),
        (False, Forwards(0, 1, 1), "1 evaluation forward (1 failed forward left out)"),
        (True, Forwards(), "training forwards"),
    ],
)
def test_a_snapshot_says_what_it_holds(training, forwards, text):
    assert Snapshot(1, {}, training, forwards).holds == text


def test_statistics_in_float32_are_read_in_float64():
    narrow = HeadStats(folded(CALLS[0]).astype(np.float32), 8, "float32")
    for name in ("rows", "normalized_entropy", "normalized_entropy_p10", "max_logit", "log2_curvature"):
        assert getattr(narrow, name).dtype == np.float64
    assert narrow.merge(narrow).values.dtype == np.float64
