"""A plain monitor in four processes: one log of the whole batch, and nobody waits for a process that does not come."""

import pickle

import numpy as np
import processes_monitor
import pytest
from processes import needs_gloo, start
from processes_monitor import INPUTS, LIMIT, SIZE, sharp_model

from hnf_attention import AttentionStabilityMonitor
from hnf_attention.integrations import read_jsonl
from hnf_attention.statistics.heads import Forwards

pytestmark = [
    pytest.mark.slow,
    needs_gloo,
]
ROWS, MINE = 8 * 20, 2 * 20  # of the whole batch, and of one process


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("monitors")
    start(processes_monitor.main, (str(folder),), SIZE)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """By scenario, what each process found."""
    each = [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(SIZE)]
    return {scenario: [process[scenario] for process in each] for scenario in each[0]}


@pytest.fixture(scope="module")
def alone():
    """The diagnosis of one process with the whole batch, and what it proposes."""
    model = sharp_model()
    with AttentionStabilityMonitor(model, log_every=1) as monitor:
        model(INPUTS)
        diagnosis = monitor.on_step()
        return diagnosis, monitor.get_intervention(diagnosis)


def test_a_plain_monitor_judges_the_whole_batch_under_plain_names(found, alone):
    expected, proposed = alone
    issues = [(i.layer, i.head, i.issue_type) for i in expected.issues]
    assert issues
    for snapshot, theirs, _, wanted, lost in found["plain"]:
        assert theirs == issues and not lost
        assert list(snapshot.layers) == list(expected.stats) == ["blocks.0.attn", "blocks.1.attn"]
        for name, stats in expected.stats.items():
            np.testing.assert_allclose(snapshot.layers[name].values, stats.values, rtol=1e-4, atol=1e-5)
        assert wanted["action"] == proposed["action"] and set(wanted["layers"]) == set(proposed["layers"])
        assert snapshot.forwards in (Forwards(4, 0, 0), Forwards())


def test_process_0_alone_writes_and_logs(found, folder):
    messages = [each[2] for each in found["plain"]]
    assert messages[0] and messages[1:] == [[]] * 3
    log = read_jsonl(folder / "attention.jsonl")
    assert [line["step"] for line in log.snapshots] == [1, 2]
    assert log.snapshots[0]["layers"]["blocks.0.attn"]["rows"] == [ROWS] * 4


@pytest.mark.parametrize("how", ["restores", "dropped", "silent"])
def test_a_monitor_that_is_gone_hangs_no_other(found, how):
    for rank, (steps, said, status) in enumerate(found[how]):
        if rank == 2:
            assert steps[0][1] == ROWS and len(steps) == 1
            continue
        assert [rows for _, rows in steps] == [ROWS, MINE, MINE, MINE]
        taken = [took for took, _ in steps]
        if how == "silent":
            assert LIMIT <= taken[1] < LIMIT + 5 and max(taken[2:]) < LIMIT
            why = f"3 of 4 processes came within {LIMIT} s"
        else:
            assert max(taken) < 20  # the limit is 60
            why = "process 2 ended its monitor"
        assert len(said) == 1 and why in said[0]
        assert status["ranks"] == why
        assert status["auto_intervene"] == "each process would change its weights by its own statistics"


def test_a_step_that_one_process_ends_alone_hangs_nobody(found):
    for rank, taken in enumerate(found["one_steps_alone"]):
        assert len(taken) == 3 + (rank == 1)
        assert max(taken) < LIMIT + 5 and taken[-1] < LIMIT


def test_layers_of_the_same_name_that_are_no_copies_are_not_added_up(found):
    for rows, said in found["stages"]:
        assert rows == MINE
        assert len(said) == 1 and "processes 0 and 1 hold different weights in the layer" in said[0]


def test_heads_that_are_split_over_processes_are_not_added_up(found):
    for rank, (is_alone, leads, said) in enumerate(found["split"]):
        assert is_alone and leads == (rank == 0)
        assert len(said) == (rank == 0)
    assert "the weight blocks.0.attn.qkv.weight is split over processes as" in found["split"][0][2][0]


def test_weights_that_fsdp_splits_belong_to_whole_heads(found):
    for rows, said in found["fsdp"]:
        assert rows == ROWS and said == []
