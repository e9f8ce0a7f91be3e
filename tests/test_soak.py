"""The checks of the soak find what grows."""

import copy
import json
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
if not (BENCH / "soak.py").is_file():
    pytest.skip("the benchmarks are in the checkout only", allow_module_level=True)


@pytest.fixture
def soak(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import soak

    return soak


def flat(name):
    row = {"ms": 1.0, "mb": 100.0, "objects": 1000, "card_bytes": 0}
    return [row | {name: 10 * i, "log_steps": i, "file_bytes": 1000 * i} for i in range(1, 11)]


def document():
    left = {"hooks": 0, "functions": 0, "threads": 0, "monitor_alive": False, "garbage": 0}
    run = {"windows": flat("step"), "left": left, "status": "all parts work"}
    run |= {"log_steps_in_file": 10, "log_steps_expected": 10}
    return {"long_run": run, "pairs": {"windows": flat("pair"), "left": {"hooks": 0, "functions": 0}}}


def failing(soak, found):
    return [name for name, (holds, _) in soak.judged(found).items() if not holds]


@pytest.mark.slow
def test_each_check_finds_its_growth(soak):
    assert not failing(soak, document())
    for part, prefix in (("long_run", "training"), ("pairs", "instrument and restore")):
        for name, value, said in (
            ("mb", 130.0, "MB"),
            ("objects", 9_000, "objects"),
            ("card_bytes", 1, "bytes"),
        ):
            grown = copy.deepcopy(document())
            grown[part]["windows"][-1][name] = value
            assert failing(soak, grown) == [f"{prefix}: {said}"]
        slow = copy.deepcopy(document())
        slow[part]["windows"][-1]["ms"] = 1.5
        assert failing(soak, slow) == [f"{prefix}: time"]
        left = copy.deepcopy(document())
        left[part]["left"]["functions"] = 1
        assert failing(soak, left) == [f"{prefix}: left behind"]
    large = copy.deepcopy(document())
    large["long_run"]["windows"][-1]["file_bytes"] = 20_000
    assert failing(soak, large) == ["training: file"]
    lost = copy.deepcopy(document())
    lost["long_run"]["log_steps_in_file"] = 9
    assert failing(soak, lost) == ["training: log steps"]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_short_soak_holds_but_for_its_noise(soak, tmp_path):
    soak.main(
        [
            "--device",
            "cpu",
            "--steps",
            "2000",
            "--pairs",
            "100",
            "--seconds",
            "100",
            "--out",
            str(tmp_path / "o"),
        ]
    )
    found = json.loads((tmp_path / "o").read_text())
    assert found["long_run"]["log_steps_in_file"] == 20
    assert {name for name, x in found["checks"].items() if not x["holds"]} <= {
        "training: time",
        "instrument and restore: time",
    }
