"""The runs over processes, `bench/two_cards.py`, in tiny sizes with gloo on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from processes import needs_gloo

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "two_cards.py"
if not SCRIPT.is_file():
    pytest.skip("the benchmarks are in the checkout only", allow_module_level=True)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.exhaustive,
    needs_gloo,
]


def run(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


@pytest.mark.parametrize("part", ["statistics", "leaving", "interventions", "rings"])
def test_every_promise_holds_over_two_processes(part, tmp_path):
    out = tmp_path / "out.json"
    done = run("--processes", 2, "--tiny", "--parts", part, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "FAILS" not in done.stdout and "holds" in done.stdout
    written = json.loads(out.read_text())
    assert (written["processes"], written["backend"]) == (2, "gloo")
    assert "error" not in written["results"][part]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--processes", 1], "expected at least 2 processes, got 1"),
        (["--processes", 2, "--length", 6], "expected --length to be a multiple of 4, got 6"),
    ],
)
def test_wrong_arguments_are_errors(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2 and message in done.stderr
