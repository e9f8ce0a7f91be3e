"""The Hopper forward's own code on a CPU (`gluon_on_cpu`): against fp64, with the launches beside it."""

import inspect
import itertools
import random
import time
from dataclasses import replace
from unittest import mock

import pytest
import torch
from cases import Case, close, oracle
from test_hopper_intervals import CALLS, FIELDS, TOLERANCE, WIDTHS

pytest.importorskip("triton", reason="Triton kernels need Linux")
import gluon_on_cpu

from hnf_attention.kernels.hopper import host
from hnf_attention.kernels.hopper.kernel import hopper_kernel
from hnf_attention.kernels.hopper.plan import Plan

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter runs the kernels beside it"
)
PROGRAMS = 3  # few, so that each computes several blocks


def launch(kernel, grid, plan, device, arguments, numbers, **options):
    assert kernel is hopper_kernel
    assert tuple(inspect.signature(kernel.fn).parameters) == (*arguments, *numbers, "PLAN")
    gluon_on_cpu.launch(kernel, grid, plan, arguments, numbers)


@pytest.fixture
def forward(monkeypatch):
    monkeypatch.setattr(host, "launch", launch)
    monkeypatch.setattr(host, "_multiprocessors", lambda device: PROGRAMS)
    return host.forward


def agree(forward, case, mask=None):
    q, k, v, drawn, sinks = case.tensors(torch.float16)
    tensors = q, k, v, drawn if mask is None else mask, sinks
    out, *rows, _ = forward(*tensors[:3], case.options(*tensors))
    wanted = oracle(case, *tensors)
    for (name, tolerance), got, true in zip(FIELDS.items(), rows, wanted[1:], strict=True):
        close(got, true, tolerance, name)
    close(out, wanted[0], TOLERANCE[out.dtype], "out")


QUICK = {
    "several turns": Case(1, 4, 2, 300, 300, 64, 64, is_causal=True, transposed=True),
    "fewer keys": Case(1, 2, 1, 300, 140, 64, 64, is_causal=True),
    "both sides": Case(1, 2, 1, 333, 457, 128, 128, window_size=90, sinks=True),
    "window of whole tiles": Case(1, 2, 1, 400, 400, 64, 64, window_size=128, is_causal=True),
    "pack": Case(1, 2, 1, 500, 500, 64, 64, seqlens=(0, 60, 90, 90, 330, 470), is_causal=True, sinks=True),
    "window of odd length": Case(1, 1, 1, 300, 300, 64, 64, window_size=100, is_causal=True),
    "pack, wide": Case(1, 1, 1, 300, 300, 256, 200, seqlens=(0, 70, 120, 300), transposed=True),
    "pack, wide, window": Case(1, 1, 1, 300, 300, 256, 256, seqlens=(0, 10, 120, 300), window_size=70),
    "pack with a window": Case(
        1, 1, 2, 420, 420, 128, 128, seqlens=(0, 30, 420), window_size=128, is_causal=True
    ),
    "mask": Case(1, 1, 2, 140, 140, 64, 64, mask="rows"),
    "mask with holes": Case(1, 1, 1, 70, 70, 64, 64, mask="bool"),
}


CORRECTED = {"mask", "mask with holes"}  # by the launch behind


@pytest.mark.parametrize("name", QUICK)
def test_calls_match_the_oracle(forward, name, monkeypatch):
    if name not in CORRECTED:
        monkeypatch.setattr(host.huge_rows, "compute_again", lambda *_: None)
    agree(forward, QUICK[name])


def test_padding_is_computed_without_the_launch_behind(forward, monkeypatch):
    """On the left of one sequence and on the right of the other; the first rows of the former see no key."""
    monkeypatch.setattr(host.huge_rows, "compute_again", lambda *_: None)
    keys = torch.arange(300)
    seen = torch.stack([keys >= 170, keys < 200])[:, None, None]
    agree(forward, Case(2, 1, 2, 300, 300, 64, 64, is_causal=True), seen)


# With "large scores" fused sums round otherwise than these; calls of many blocks take a minute.
SLOW = [name for name in CALLS if name != "large scores" and not name.startswith("many")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "head_dim", [64, *(pytest.param(d, marks=pytest.mark.exhaustive) for d in (128, 256))]
)
@pytest.mark.parametrize("name", SLOW)
def test_all_calls_match_the_oracle(forward, name, head_dim):
    agree(forward, replace(CALLS[name], head_dim=head_dim, value_dim=head_dim))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal window", "causal pack"])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_widths(forward, widths, name):
    agree(forward, replace(CALLS[name], head_dim=widths[0], value_dim=widths[1]))


SETTINGS = [  # every field both ways in the first two; CI leaves the others out
    pytest.param(*values, marks=() if i in (0, 15) else pytest.mark.exhaustive)
    for i, values in enumerate(itertools.product((False, True), (False, True), (False, True), (3, 4)))
]


@pytest.mark.slow
@pytest.mark.parametrize(("early", "by_threes", "shared_unit", "stages"), SETTINGS)
def test_what_tunes_a_plan_changes_nothing(forward, early, by_threes, shared_unit, stages):
    case = Case(1, 2, 1, 400, 400, 64, 64, window_size=128, is_causal=True)
    q, k, v, *_ = tensors = case.tensors(torch.float16)
    options = case.options(*tensors)
    out, *rows = forward(q, k, v, options)[:5]
    tuned = host.plan_of(q, k, v, options)
    other = replace(tuned, early=early, by_threes=by_threes, shared_unit=shared_unit, stages=stages)
    assert isinstance(other, Plan)
    for got, wanted in zip(forward(q, k, v, options, other), (out, *rows), strict=False):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)


def test_an_infinite_visible_score_makes_its_row_nan_and_a_hidden_one_does_not(forward):
    """Row 5 sees key 30 and row 7 key 20. Row 6 does not see key 100, and the launch behind would correct all three."""
    case = Case(1, 1, 1, 200, 200, 64, 64, window_size=40)
    q, k, v, *_ = tensors = case.tensors(torch.bfloat16)
    q[..., :3], k[..., :3] = 0, 0
    for column, (row, key, sign) in enumerate([(5, 30, -1), (6, 100, 1), (7, 20, 1)]):
        q[0, 0, row, column], k[0, 0, key, column] = 1e30, sign * 1e30
    with mock.patch.object(host.huge_rows, "compute_again"):
        out, *rows = forward(q, k, v, case.options(*tensors))[:5]
    broken = torch.zeros(200, dtype=torch.bool)
    broken[[5, 7]] = True
    for row in rows:
        assert torch.equal(row[0, 0].isnan(), broken)
    assert not out[0, 0, ~broken].isnan().any()


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("slow_part", ["producer", "one consumer", "both consumers"])
def test_parts_may_go_on_at_any_pace(forward, monkeypatch, slow_part, window):
    """Blocks of one tile follow each other: the producer is as many turns ahead as it may be. A window has a ring of
    four stages, other calls have three."""
    draw, wait = random.Random(0), gluon_on_cpu.Program.wait
    slow = {"producer": (2,), "one consumer": (1,), "both consumers": (0, 1)}[slow_part]

    def late(program, barrier, parity):
        if program.part.number in slow:
            time.sleep(draw.random() * 0.004)
        wait(program, barrier, parity)

    monkeypatch.setattr(gluon_on_cpu.Program, "wait", late)
    edges = tuple(range(0, 1281, 128))
    agree(forward, Case(1, 2, 2, 1280, 1280, 64, 64, seqlens=edges, is_causal=True, window_size=window))


def test_a_part_that_waits_in_vain_is_an_error(forward, monkeypatch):
    """A consumer that never says that it has read its keys."""
    monkeypatch.setattr(gluon_on_cpu, "WAIT", 0.5)
    monkeypatch.setattr(gluon_on_cpu.Barrier, "change", lambda *_: None)
    case = QUICK["several turns"]
    with pytest.raises(TimeoutError, match="waits for an mbarrier in vain"):
        agree(forward, case)
