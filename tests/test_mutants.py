"""The faults that `mutation_score.py` plants can be planted, and it tells the ones that are noticed from the others."""

from pathlib import Path

import mutation_score
import pytest
from mutants import MUTANTS
from mutation_score import CONTROL, judged

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "kernels").is_dir():
    pytest.skip("the kernels' sources are in the checkout only", allow_module_level=True)


def test_each_fault_stands_once_in_its_file_and_changes_it():
    for mutant in (*MUTANTS, CONTROL):
        assert (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1, mutant
        assert mutant.old != mutant.new
    assert len(set(MUTANTS)) == len(MUTANTS) >= 40


def test_a_fault_is_planted_while_the_tests_run_and_taken_back(tmp_path, monkeypatch):
    file = tmp_path / CONTROL.file
    file.parent.mkdir(parents=True)
    file.write_text(f"before {CONTROL.old} after", encoding="utf-8")
    seen = []

    def run(tree, function):
        seen.append((function.func.__name__, file.read_text(encoding="utf-8")))
        return "survived" if len(seen) < 3 else "caught"

    monkeypatch.setattr(mutation_score, "in_a_fork", run)
    assert judged(tmp_path, CONTROL, fuzzed_only=False) == "tests"
    assert judged(tmp_path, CONTROL, fuzzed_only=True) == "fuzz"
    planted = f"before {CONTROL.new} after"
    assert seen == [(name, planted) for name in ("fuzz", "tests", "tests", "fuzz")]
    assert CONTROL.old in file.read_text(encoding="utf-8")
