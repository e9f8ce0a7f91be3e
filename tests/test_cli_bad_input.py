"""Every error of the command line: one line on standard error, exit code 2, no traceback."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import bad_input
import pytest

import hnf_attention
from hnf_attention.cli.main import main

pytest.importorskip("transformers")
LONGEST = 500  # characters of a line that people read


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad_input")
    bad_input.make(root)
    return root


@pytest.mark.parametrize(("arguments", "said"), bad_input.CASES, ids=[case for case, _ in bad_input.CASES])
def test_bad_input_is_one_line_and_exit_code_two(arguments, said, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(shlex.split(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("hnf-attention: ") and captured.err.count("\n") == 1, captured.err
    assert said in captured.err and "fault of hnf-attention" not in captured.err
    assert len(captured.err) <= LONGEST


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param("analyze cut --text text.txt", marks=pytest.mark.exhaustive),
        pytest.param("check nan --weights", marks=pytest.mark.exhaustive),
        pytest.param("demo --steps 3", marks=pytest.mark.exhaustive),
        "dance",
    ],
)
def test_a_process_says_the_same(arguments, folder):
    command = [sys.executable, "-m", "hnf_attention", *shlex.split(arguments)]
    path = os.pathsep.join([str(Path(hnf_attention.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("hnf-attention: ") and done.stderr.count("\n") == 1, done.stderr
