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

    def run(tree, marks):
        seen.append((marks, file.read_text(encoding="utf-8")))
        return "survived" if len(seen) == 1 else "caught"

    monkeypatch.setattr(mutation_score, "run_tests", run)
    assert (
        judged(tmp_path, CONTROL, quick=False) == "slow" and judged(tmp_path, CONTROL, quick=True) == "quick"
    )
    planted = f"before {CONTROL.new} after"
    assert seen == [
        (mutation_score.QUICK, planted),
        (mutation_score.SLOW, planted),
        (mutation_score.QUICK, planted),
    ]
    assert CONTROL.old in file.read_text(encoding="utf-8")
