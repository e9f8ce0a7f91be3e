"""Run by test_run_log_crashes.py: processes that are killed while they write a run log, and one whose disk is full."""

import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np
from heads import head_stats

from hnf_attention.diagnosis import AttentionDiagnosis
from hnf_attention.run_log import RunLog, RunLogWriter, metrics, writer

HEADS = 48


def at(step):
    return AttentionDiagnosis([], {"a": head_stats(HEADS, max_logit=float(step))}, step)


def write_until_killed(path, first, told):
    """Write log steps, and tell of each one that is in the file."""
    out = RunLogWriter(path)
    for step in range(first, first + 100_000):
        out.write(at(step))
        assert out.flush()
        os.write(told, b"%d\n" % step)


def kill(path, times, seed):
    """Kill so many processes, each of which goes on where the one before was."""
    chance, first, sessions = random.Random(seed), 1, 0
    for _ in range(times):
        read, told = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            write_until_killed(path, first, told)
        os.close(told)
        begun = b""
        if chance.random() < 0.9:  # the others may be killed while they make the file
            begun = os.read(read, 100)
        time.sleep(chance.uniform(0.0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(read, "rb") as lines:
            told_of = (begun + lines.read()).splitlines(keepends=True)
        steps = [int(line) for line in told_of if line.endswith(b"\n")]
        written = check(path, -5)
        assert not steps or written[-1] in (steps[-1], steps[-1] + 1), (steps[-1], written[-1:])
        if written:
            sessions += bool(steps)
            first = written[-1] - 1 if len(written) > 2 and chance.random() < 0.5 else written[-1] + 1
    assert sessions > times // 2  # most had the time to write
    return len(check(path, 0))


def check(path, first):
    """The log steps of the file, which are whole from the one at this place on."""
    try:
        log = RunLog(path)
    except (FileNotFoundError, ValueError):
        return []  # killed before the file was one
    with log:
        steps = log.steps.tolist()
        assert steps == list(range(1, len(steps) + 1))
        row = metrics.NAMES.index("max_logit")
        for record in log.records(after=steps[first:][0] - 1 if len(steps) > 5 else 0):
            wanted = np.full(HEADS, record.step, np.float32)
            np.testing.assert_allclose(record.table[row], wanted, rtol=2**-12)
        return steps


def fill(path):
    """A disk that is full for a while: nothing raises, and what waited is written later."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    out = RunLogWriter(path)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, most))
    for step in range(1, 401):
        out.write(at(step))
    assert not out.flush()
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    out.write(at(401))
    assert out.flush()
    out.close()
    with RunLog(path) as log:
        return log.steps.tolist()


if __name__ == "__main__":
    kind, folder, times, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    if kind == "fragments":
        writer.network_file_system = lambda folder: "nfs4"
    print("killed", kill(folder / "killed.db", times, seed))
    print("full", *fill(folder / "full.db"))
