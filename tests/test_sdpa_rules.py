"""The runner of PyTorch's SDPA tests and FlashAttention's rules: small cases on the CPU; a fault breaks a rule."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from fuzz_run import interpreted_kernels

BENCH = Path(__file__).resolve().parents[1] / "bench"
if not (BENCH / "sdpa_rules.py").is_file():
    pytest.skip("the benchmarks are in the checkout only", allow_module_level=True)
if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
    pytest.skip("torch < 2.11 has no registry of flash kernels", allow_module_level=True)
sys.path.insert(0, str(BENCH))
torch_sdpa = importlib.import_module("hnf_attention.integrations.torch_sdpa")
sdpa_rules, sdpa_grids, sdpa_single = map(
    importlib.import_module, ("sdpa_rules", "sdpa_grids", "sdpa_single")
)
sys.path.remove(str(BENCH))
Flash, GridCase, grids, judged = sdpa_grids.Flash, sdpa_grids.GridCase, sdpa_grids.grids, sdpa_grids.judged
FLOAT, HALF = torch.float32, torch.float16

pytestmark = pytest.mark.filterwarnings("ignore:.*[Oo]verrid.*a previously registered kernel:UserWarning")


@pytest.fixture(autouse=True)
def on_cpu():
    registration = torch_sdpa.Registration("CPU")
    yield
    registration.remove()


def test_a_rule_holds_and_is_broken_by_a_wrong_scale(monkeypatch):
    flash = Flash(False)
    for case in (
        GridCase("flash", 1, 2, 2, 8, 4, 16, FLOAT),
        GridCase("FlashAttention", 1, 2, 1, 9, 9, 16, FLOAT, is_causal=True),
    ):
        assert max(judged(case, "cpu", flash).values()) <= 1
        with monkeypatch.context() as patch:
            patch.setattr(
                Flash, "checked", lambda self, *x, is_causal, scale: 1.01 * self(*x, is_causal=is_causal)
            )
            found = judged(case, "cpu", flash)
        assert (
            found["out"] > 1 or case.rule == "flash"
        )  # its relative tolerance is large where a gradient is near 0
    masked = GridCase("masked", 1, 2, 2, 8, 4, 16, FLOAT, masked=True)
    assert set(judged(masked, "cpu", flash)) == {"out", "query", "key", "value", "mask"}


def test_the_grids_have_every_size_of_the_tests():
    cases = list(grids(tiny=False))
    for rule, sizes in (("flash", 8 * 8), ("FlashAttention", 26), ("masked", 9 * 10), ("efficient", 8 * 8)):
        assert len({(case.queries, case.keys) for case in cases if case.rule == rule}) == sizes
    assert {case.head_dim for case in cases if case.rule == "FlashAttention"} == {64, 96, 128, 192, 256}
    assert len(sdpa_grids.FLASH_HEAD_DIMS) == len({c.head_dim for c in cases if c.rule == "flash"}) == 12


def test_another_kernel_than_ours_is_noticed():
    flash = Flash(False)
    flash.forward = lambda *x, **keywords: x[0]
    with pytest.raises(AssertionError, match="another kernel"):
        flash.checked(torch.ones(1), torch.ones(1), torch.ones(1))


def test_the_table_counts_what_ran_and_what_broke():
    lines = [
        {"rule": "flash", "case": "a", "errors": {"out": 0.5}},
        {"rule": "flash", "case": "b", "errors": {"out": 1.5}},
        {"rule": "flash", "case": "c", "errors": {"out": torch.nan}},
        {"rule": "single calls", "case": "d", "fault": "ValueError: no"},
    ]
    first, second = sdpa_rules.table(lines, {"flash": 4, "single calls": 1})[1:]
    assert first.split()[:4] == ["flash", "3", "4", "2"] and second.split() == [
        "single",
        "calls",
        "1",
        "1",
        "1",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in sdpa_single.RULES if name not in sdpa_single.ON_CARD])
def test_single_calls(name):
    torch.manual_seed(0)
    sdpa_single.RULES[name](sdpa_single.Bench("cpu"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning")
def test_the_rules_hold_for_interpreted_kernels():
    flash = Flash(False)
    cases = [
        GridCase("flash", 1, 2, 2, 8, 64, 16, HALF),
        GridCase("efficient", 1, 2, 2, 8, 64, 16, FLOAT, is_causal=True),
        GridCase("masked", 1, 2, 2, 8, 65, 16, HALF, masked=True),
        *(
            GridCase("FlashAttention", 1, 2, 1, m, n, 64, HALF)
            for m, n in ((1, 1), (1, 3), (2, 1), (64, 128))
        ),
    ]
    with interpreted_kernels(0):
        for case in cases:
            assert max(judged(case, "cpu", flash).values()) <= 1, case
