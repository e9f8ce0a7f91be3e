"""Launching what Triton compiled before: looked up by the classes of the arguments."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton kernels need Linux")
from hnf_attention.kernels.shared import launch as module
from hnf_attention.kernels.shared.launch import launch

DEVICE = torch.device("cpu")


class Kernel:
    """A stand-in for a jitted function; compiles at each call, and says which way it was launched."""

    def __init__(self, compiles=True):
        self.fn = lambda x, number, window, PLAN: None
        self.compiles = compiles
        self.ways = []

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.ways.append(("compiled", grid, len(arguments), options))
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


def start(kernel, x, number=8, window=3, plan="a", **options):
    launch(kernel, (2, 1, 1), plan, DEVICE, {"x": x, "number": number}, {"window": window}, **options)


def ways(kernel):
    return [way[0] for way in kernel.ways]


def test_the_second_launch_of_a_kind_takes_what_the_first_compiled():
    kernel, x = Kernel(), torch.zeros(32)
    for scale in (0.5, 0.7):
        start(kernel, x, scale, num_warps=4)
    first, second = kernel.ways
    assert first == ("compiled", (2, 1, 1), 4, {"num_warps": 4, **module.FUSED})
    assert second == ("kept", (2, 1, 1), 4)


def test_an_option_of_none_is_not_passed_on():
    """AMD's compiler refuses the name of an option that it does not have."""
    kernel = Kernel()
    start(kernel, torch.zeros(32), num_warps=4, maxnreg=None)
    assert kernel.ways == [("compiled", (2, 1, 1), 4, {"num_warps": 4, **module.FUSED})]


def test_other_plans_options_and_kernels_are_compiled_anew():
    kernel, other, x = Kernel(), Kernel(), torch.zeros(32)
    start(kernel, x)
    start(kernel, x, plan="b")
    start(kernel, x, num_warps=8)
    start(other, x)
    assert ways(kernel) == ["compiled"] * 3 and ways(other) == ["compiled"]


@pytest.mark.parametrize(
    ("one", "same", "different"),
    [
        (8, 24, 16),
        (32, 48, 1),
        (1, 1, 2),
        (17, 2**31 - 1, 2**31 + 1),
        (16, 0, 2**32),
        ((None, 8), (None, 9), (None, 16)),
        (torch.zeros(8), torch.zeros(3), torch.zeros(9)[1:]),
        (torch.zeros(8), torch.nn.Parameter(torch.zeros(8)), torch.zeros(8, dtype=torch.float16)),
        (None, None, 0.5),
    ],
)
def test_a_class_is_what_triton_specialises_on(one, same, different):
    kernel, x = Kernel(), torch.zeros(32)
    for argument in (one, same, different):
        start(kernel, x, argument)
    assert ways(kernel) == ["compiled", "kept", "compiled"]


def test_a_number_that_is_not_specialised_on_counts_by_its_width():
    kernel, x = Kernel(), torch.zeros(32)
    for window in (1, 16, 7, 2**31):
        start(kernel, x, window=window)
    assert ways(kernel) == ["compiled", "kept", "kept", "compiled"]


def test_arguments_stand_in_the_order_of_the_parameters():
    with pytest.raises(TypeError, match="expected arguments"):
        launch(Kernel(), (1, 1, 1), "a", DEVICE, {"number": 8, "x": torch.zeros(32)}, {"window": 3})


def test_the_interpreter_compiles_nothing():
    kernel, x = Kernel(compiles=False), torch.zeros(32)
    for _ in range(2):
        start(kernel, x)
    assert ways(kernel) == ["compiled"] * 2


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "_LIMIT", 3)
    kernel, x = Kernel(), torch.zeros(32)
    for plan in range(10):
        start(kernel, x, plan=plan)
    assert len(module._compiled) <= 3
