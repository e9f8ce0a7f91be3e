"""Processes that meet, come late, leave, or never come, as threads of one process with one store."""

import threading
import time

import pytest
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from hnf_attention.monitoring import agreement, ranks
from hnf_attention.monitoring.agreement import Agreement, Together
from hnf_attention.monitoring.process_groups import ProcessGroups

MEMBERS = [0, 1, 2]


@pytest.fixture
def store():
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield store
    dist.destroy_process_group()


@pytest.fixture
def members(store):
    def make(limit=20.0):
        made = []
        for _ in MEMBERS:  # each process counts for itself
            agreement._made.clear()
            made.append(Agreement(MEMBERS, limit))
        return made

    return make


def at_once(*actions):
    """What the actions return, each in a thread of its own."""
    results = [None] * len(actions)

    def run(index):
        results[index] = actions[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def late(seconds, action):
    def run():
        time.sleep(seconds)
        return action()

    return run


def test_all_meet_again_and_again_and_leave_nothing_behind(members, store):
    three = members()
    for _ in range(5):
        assert at_once(*(x.meet for x in three)) == [None] * 3
    keys = store.num_keys()
    for _ in range(20):
        assert at_once(*(x.meet for x in three)) == [None] * 3
    assert store.num_keys() == keys


def test_one_that_comes_late_but_in_time(members):
    first, second, third = members()
    assert at_once(first.meet, second.meet, late(0.1, third.meet)) == [None] * 3


def test_one_that_does_not_come_keeps_the_others_for_the_time_limit_only(members):
    first, second, third = members(0.2)
    start = time.monotonic()
    why = at_once(first.meet, second.meet)
    assert why == ["2 of 3 processes came within 0.2 s"] * 2 and time.monotonic() - start < 5
    assert third.meet() == why[0]  # later than the limit: it does not meet anybody either


def test_one_that_leaves_keeps_nobody_waiting(members):
    three = members()
    assert at_once(*(x.meet for x in three)) == [None] * 3
    three[2].leave("process 2 ended its monitor after step 7")
    start = time.monotonic()
    assert at_once(three[0].meet, three[1].meet) == ["process 2 ended its monitor after step 7"] * 2
    assert time.monotonic() - start < 5


def test_one_that_leaves_while_the_others_wait(members):
    first, second, third = members()
    start = time.monotonic()
    why = at_once(first.meet, second.meet, late(0.1, lambda: third.leave("gone")))
    assert why == ["gone", "gone", None] and time.monotonic() - start < 5


def test_the_first_verdict_counts(members):
    first, second, third = members()
    first.leave("first")
    second.leave("second")
    assert third.meet() == "first"


def test_agreements_of_one_process_do_not_mix(store):
    agreement._made.clear()
    one, other = Agreement([0], 1.0), Agreement([0], 1.0)
    one.leave("one")
    assert other.meet() is None and one.meet() == "one"


def test_weights_that_cannot_be_read_are_a_reason_for_every_process(store, monkeypatch):
    def out_of_memory(model):
        raise MemoryError("out of memory")

    monkeypatch.setattr(ranks, "_sample", out_of_memory)
    why = ranks._different_models(nn.Linear(2, 2))
    assert why == "process 0 could not read its weights (MemoryError: out of memory)"


@pytest.fixture
def eight():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("batch, warned", [([0, 2], True), ([0, 2, 4, 6], False)])
def test_groups_that_leave_out_processes_say_that_they_have_no_time_limit(eight, caplog, batch, warned):
    Together(ProcessGroups(batch=dist.new_group(batch), heads=dist.new_group([0, 1])))
    expected = ["its 2 groups leave out some of the run's 8 processes"] * warned
    assert len(caplog.records) == len(expected) and all(text in caplog.text for text in expected)
