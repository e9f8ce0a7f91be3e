"""The doctor: what it prints is what is chosen, and a wrong result fails its self-test."""

from dataclasses import replace

import pytest
import torch

from hnf_attention import attention
from hnf_attention.cli import doctor
from hnf_attention.cli.main import main
from hnf_attention.engine import engines


def test_it_reports_versions_paths_and_a_passing_self_test(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed and "self-test passed" in printed
    assert ("no CUDA card" in printed) == (not torch.cuda.is_available())


def test_every_head_dimension_and_dtype_has_one_path():
    taken = [pair for pairs in doctor.paths().values() for pair in pairs]
    assert len(taken) == len(set(taken)) == len(doctor.HEAD_DIMS) * len(doctor.OUTPUT_TOLERANCE)
    if not torch.cuda.is_available():
        assert list(doctor.paths()) == [f"{engines.REFERENCE} / {engines.REFERENCE}"]


@pytest.mark.parametrize("broken", ["out", "statistics", "gradients"])
def test_a_wrong_number_fails(broken):
    good = next(doctor.self_test())
    assert good.passed
    for number in (1.0, float("nan")):
        assert not replace(good, **{broken: number}).passed


def test_a_wrong_kernel_is_noticed(monkeypatch, capsys):
    def off_by_a_little(*args, **kwargs):
        out, rows = attention(*args, **kwargs)
        return out, replace(rows, entropy=rows.entropy + 1e-3)

    monkeypatch.setattr(doctor, "attention", off_by_a_little)
    assert main(["doctor"]) == 1
    assert "12 of 12 self-tests failed" in capsys.readouterr().out
