"""The examples run as they are."""

import runpy
import sys
from pathlib import Path

import pytest

from hnf_attention.integrations import read_jsonl

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("the examples are in the checkout only", allow_module_level=True)
state = pytest.importorskip("accelerate.state")


@pytest.fixture
def accelerate():
    """Accelerate keeps what it found out about the machine for the whole process."""
    state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate(accelerate, monkeypatch, tmp_path, capsys):
    path = tmp_path / "attention.jsonl"
    arguments = [str(path), "--steps", "9", "--log-every", "3", "--cpu"]
    monkeypatch.setattr(sys, "argv", ["with_accelerate.py", *arguments])
    runpy.run_path(str(EXAMPLES / "with_accelerate.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert shown.count("qk_clip: scaled the weights of transformer.h.0.attn heads [0, 1, 2, 3]") >= 1
    assert shown.count("times 0.5") == 1

    first, *later = read_jsonl(path).snapshots
    assert [first["step"], *(line["step"] for line in later)] == [3, 6, 9]
    rows = first["layers"]["transformer.h.0.attn"]["rows"]
    assert rows == [2 * 4 * 64] * 4  # two accumulated batches of four windows of 64 bytes
    tops = [max(line["layers"]["transformer.h.0.attn"]["max_logit"]) for line in (first, later[-1])]
    assert tops[0] > 500 and tops[1] < 100
