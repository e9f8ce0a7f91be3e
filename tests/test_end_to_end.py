"""Whole trainings under a monitor, `bench/end_to_end.py`, in their tiny forms on a CPU."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[1] / "bench"
if not (BENCH / "end_to_end.py").is_file():
    pytest.skip("the benchmarks are in the checkout only", allow_module_level=True)
pytest.importorskip("transformers", minversion="5")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.slow


@pytest.fixture
def end_to_end(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import end_to_end

    return end_to_end


@pytest.mark.filterwarnings("ignore")  # of the trainers, and of operations without a deterministic form
@pytest.mark.parametrize("part", ["packs", "gpt_oss", "gemma3", "mla"])
def test_a_training_is_read_as_it_is(part, end_to_end, monkeypatch, tmp_path, capsys):
    out = tmp_path / "out.json"
    monkeypatch.setattr(
        sys, "argv", ["", "--device", "cpu", "--parts", part, "--steps", "1", "--out", str(out)]
    )
    end_to_end.main()
    assert f"{part:8} holds  2/2 layers, bit-equal" in capsys.readouterr().out
    found = json.loads(out.read_text())["results"][part]
    assert found["readings"] == 3 and found["losses"][-1] < found["losses"][0]
    if part == "packs":
        assert found["sequences"] > 1


def test_statistics_that_are_off_are_found(end_to_end, monkeypatch):
    """The comparison itself: with windows one key too wide, it says so."""
    from trainings import loop, recipes

    device = torch.device("cpu")
    recipe = recipes.RECIPES["gemma3"]
    model, (batch,) = recipes.make(recipe, device, "sdpa"), recipes.batches(recipe, device, 1)
    assert loop.reading(model, batch, {0})["worst"] < 1e-5
    monkeypatch.setattr(loop, "window_of", lambda model, layer: 13)
    wrong = loop.reading(model, batch, {0})
    assert wrong["rows"]["lse"] > 1e-3 and wrong["heads"]["entropy"] > 1e-3
