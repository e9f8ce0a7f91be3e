"""A run log after kill -9 at random moments, and after a disk that was full."""

import subprocess
import sys
from pathlib import Path

import pytest

TIMES = {"database": 200, "fragments": 40}  # which are read whole after each one


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of file sizes are those of Linux")
@pytest.mark.parametrize("kind", TIMES)
def test_every_step_that_was_written_is_whole(kind, tmp_path):
    script = Path(__file__).with_name("crashes_run_log.py")
    command = [
        sys.executable,
        "-W",
        "ignore::DeprecationWarning",
        script,
        kind,
        tmp_path,
        str(TIMES[kind]),
        "0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    killed, full = (line.split() for line in done.stdout.splitlines())
    assert int(killed[1]) > TIMES[kind] // 2
    steps = [int(step) for step in full[1:]]
    assert steps[-1] == 401 and len(steps) >= 256 and steps == sorted(set(steps))
    # Only the oldest of those that waited may be missing.
    assert steps[-256:] == list(range(146, 402))
