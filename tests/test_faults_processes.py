"""Faults of whole processes: forks, signals, and processes of a group that die or have nothing to do."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hnf_attention.run_log import RunLog

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="signals and forks of Linux"),
]
EVERY_SECOND = [2, 4, 6, 8, 10, 12]
ROWS = 2 * 12


def start(name, folder, *rank):
    script = Path(__file__).with_name("processes_faults.py")
    command = [sys.executable, "-W", "ignore::DeprecationWarning", script, name, folder, *map(str, rank)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process, code=0):
    """What it wrote to stderr."""
    _, said = process.communicate(timeout=120)
    assert process.returncode == code, said[-3000:]
    return said


def logged(folder, name="run.db"):
    with RunLog(folder / name) as log:
        return log.steps.tolist()


def found(folder, rank=0):
    return torch.load(folder / f"{rank}.pt", weights_only=True)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["forked_workers", "forked_child"])
def test_a_fork_changes_nothing(name, tmp_path):
    said = finish(start(name, tmp_path))
    assert found(tmp_path)["same"] and logged(tmp_path) == EVERY_SECOND
    assert "hnf-attention" not in said and "Traceback" not in said
    with RunLog(tmp_path / "run.db") as log:
        assert len(log.sessions) == 1


@pytest.mark.exhaustive
def test_a_process_that_is_terminated_in_a_log_step_leaves_a_whole_log(tmp_path):
    finish(start("terminated", tmp_path), code=-signal.SIGTERM)
    assert logged(tmp_path) == [2, 4, 6, 8]


def test_a_process_that_ends_itself_at_a_signal_leaves_a_whole_log(tmp_path):
    said = finish(start("terminated_politely", tmp_path), code=7)
    assert logged(tmp_path) == [2, 4, 6, 8] and "Traceback" not in said


@pytest.mark.exhaustive
@pytest.mark.parametrize("dies", [1, 0])
def test_a_process_that_dies_takes_no_other_one_with_it(dies, tmp_path):
    """The one of number 0 also holds the store, where it is a TCP one; here it is a file."""
    both = [start(f"rank_{dies}_dies", tmp_path, rank) for rank in (0, 1)]
    finish(both[dies], code=-signal.SIGKILL)
    said = finish(both[1 - dies])
    result = found(tmp_path, 1 - dies)
    assert result["same"] and [step for step, *_ in result["steps"]] == EVERY_SECOND
    rows = [rows for _, rows, _ in result["steps"]]
    assert rows == [2 * ROWS] * 3 + [ROWS] * 3
    assert said.count("goes on with the measurements of each process alone") == 1
    assert result["took"] < 60
    if dies == 1:  # number 0 writes
        assert logged(tmp_path, "run_0.db") == EVERY_SECOND


@pytest.mark.exhaustive
def test_a_process_without_data_takes_part(tmp_path):
    both = [start("without_data", tmp_path, rank) for rank in (0, 1)]
    for process in both:
        finish(process)
    steps = [found(tmp_path, rank)["steps"] for rank in (0, 1)]
    assert steps[0] == steps[1] == [(step, (1 + (step != 4)) * ROWS, 2) for step in EVERY_SECOND]
