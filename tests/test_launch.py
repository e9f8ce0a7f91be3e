"""Launching what Triton compiled before: looked up by the caller's key, never where alignment is in doubt."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton kernels need Linux")
from hnf_attention.kernels.shared import launch as module
from hnf_attention.kernels.shared.launch import launch


class Kernel:
    """A stand-in for a jitted function; compiles at each call, and says which way it was launched."""

    def __init__(self, compiles=True):
        self.fn = lambda: None
        self.compiles = compiles
        self.ways = []

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            self.ways.append(("compiled", grid, len(arguments), constants))
            return Compiled(self) if self.compiles else None

        return run


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.ways.append(("kept", grid, len(arguments)))


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch):
    monkeypatch.setattr(module, "_compiled", {})


def ways(kernel):
    return [way[0] for way in kernel.ways]


def test_the_second_launch_of_a_kind_takes_what_the_first_compiled():
    kernel, x = Kernel(), torch.zeros(32)
    for scale in (0.5, 0.7):
        launch(kernel, (2, 1, 1), ("a",), (x, 8, scale), {"BLOCK": 16}, num_warps=4)
    first, second = kernel.ways
    assert first == ("compiled", (2, 1, 1), 3, {"BLOCK": 16, "num_warps": 4, **module.FUSED})
    assert second == ("kept", (2, 1, 1), 4)  # constants are arguments like any other


def test_other_kinds_constants_and_kernels_are_compiled_anew():
    kernel, other, x = Kernel(), Kernel(), torch.zeros(32)
    launch(kernel, (1, 1, 1), ("a",), (x,), {"BLOCK": 16})
    launch(kernel, (1, 1, 1), ("b",), (x,), {"BLOCK": 16})
    launch(kernel, (1, 1, 1), ("a",), (x,), {"BLOCK": 32})
    launch(other, (1, 1, 1), ("a",), (x,), {"BLOCK": 16})
    assert ways(kernel) == ["compiled"] * 3 and ways(other) == ["compiled"]


def test_a_tensor_that_is_not_aligned_goes_the_long_way_and_is_not_kept():
    kernel, x = Kernel(), torch.zeros(33)
    for tensor in (x[1:], torch.nn.Parameter(x)[1:], x[:32], x[1:], x[:32]):
        launch(kernel, (1, 1, 1), ("a",), (tensor,), {})
    assert ways(kernel) == ["compiled", "compiled", "compiled", "compiled", "kept"]


def test_the_interpreter_compiles_nothing():
    kernel, x = Kernel(compiles=False), torch.zeros(32)
    for _ in range(2):
        launch(kernel, (1, 1, 1), ("a",), (x,), {})
    assert ways(kernel) == ["compiled"] * 2


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "_LIMIT", 3)
    kernel, x = Kernel(), torch.zeros(32)
    for length in range(10):
        launch(kernel, (1, 1, 1), (length,), (x,), {})
    assert len(module._compiled) <= 3
