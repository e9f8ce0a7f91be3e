"""Blocks with huge scores are computed again after a forward that has one unit for all rows."""

import pytest
import torch
from cases import Case

from hnf_attention.reference import attention as reference

pytest.importorskip("triton", reason="Triton kernels need Linux")
import triton.language as tl

from hnf_attention.kernels.portable import forward, huge_rows
from hnf_attention.kernels.shared.results import Rows
from hnf_attention.kernels.shared.tiles import forward_tiles, loads_by_pointers

FIELDS = ("out", "lse", "entropy", "max_logit", "min_logit")
HUGE = {torch.float16: 2.0**14, torch.float32: 1e6, torch.bfloat16: 2.0**20}


def _tensors(dtype, device, huge, **options):
    """Inputs of which the rows `huge` of the last head have scores of HUGE^2 / 4, and what they give."""
    case = Case(**{"batch": 1, "group": 1, "num_queries": 150, "num_keys": 40} | options)
    q, k, v, *rest = case.tensors(dtype, device)
    for row in huge:
        q[0, -1, row, :] = HUGE[dtype]
        k[0, -1, 3, :] = HUGE[dtype]
        q[0, -1, row, 1::2] *= -1  # of the other keys' scores some are positive
        k[0, -1, 3, 1::2] *= -1
    given = case.options(q, k, v, *rest)
    return (q, k, v), given, forward.forward(q, k, v, given)[:5]


@pytest.mark.parametrize(
    ("dtype", "options", "broken"),
    [
        (torch.float32, {"is_causal": True}, torch.nan),
        (torch.float16, {}, 1e9),
        (torch.float32, {"window_size": 30, "sinks": True, "mask": "bool"}, torch.nan),
        (torch.float16, {"num_keys": 150, "seqlens": (0, 70, 150)}, torch.nan),
        pytest.param(torch.float32, {}, -torch.inf, marks=pytest.mark.slow),
        pytest.param(torch.float16, {"is_causal": True}, torch.nan, marks=pytest.mark.slow),
        pytest.param(torch.float16, {"is_causal": True, "scale": -0.25}, torch.inf, marks=pytest.mark.slow),
    ],
)
def test_only_blocks_with_huge_rows_are_computed_again(dtype, options, broken, device):
    huge = (9, 140)
    tensors, given, right = _tensors(dtype, device, huge, **options)
    tiles = forward_tiles(16, 16, dtype, given, False, loads_by_pointers(tensors[0].device))
    again = torch.zeros(2, 150, dtype=torch.bool, device=device)
    for row in huge:
        first = row // tiles.block_m * tiles.block_m
        again[1, first : first + tiles.block_m] = True
    found = [torch.full_like(x, 0.5) for x in right]
    for (
        row
    ) in huge:  # what such a forward may leave behind; it may be found in the maximum or in the minimum alone
        found[3 + (row == 140)][0, 1, row] = broken
        found[0][0, 1, row] = torch.nan
    huge_rows.compute_again(*tensors, given, found[0], Rows(*found[1:], None, 0))
    for name, mine, wanted in zip(FIELDS, found, right):
        assert torch.equal(mine[0][again], wanted[0][again]), name
        assert (mine[0][~again] == 0.5).all(), name


@pytest.mark.parametrize("row", [0, 31, 32, 63, 127, 149])
def test_every_part_of_the_rows_is_looked_at(row, device, monkeypatch):
    """A program reads its rows in parts; here they are few."""
    monkeypatch.setattr(huge_rows, "_ROWS", tl.constexpr(32))
    monkeypatch.setattr(huge_rows, "_programs", lambda device: 2)
    tensors, given, right = _tensors(torch.float32, device, (row,))
    found = [torch.full_like(x, 0.5) for x in right]
    found[3][0, 1, row] = torch.inf
    huge_rows.compute_again(*tensors, given, found[0], Rows(*found[1:], None, 0))
    assert torch.equal(found[0][0, 1, row], right[0][0, 1, row])


def test_without_huge_rows_nothing_is_touched(device):
    tensors, given, right = _tensors(torch.float32, device, ())
    found = [torch.full_like(x, 2.0**26 - 8) for x in right]
    huge_rows.compute_again(*tensors, given, found[0], Rows(*found[1:], None, 0))
    assert all((x == 2.0**26 - 8).all() for x in found)


def test_rows_without_a_key_are_not_computed_again(device):
    """Their largest score is -inf and their smallest one inf."""
    tensors, given, right = _tensors(torch.float32, device, ())
    found = [torch.full_like(x, 0.5) for x in right]
    found[3][:], found[4][:] = -torch.inf, torch.inf
    huge_rows.compute_again(*tensors, given, found[0], Rows(*found[1:], None, 0))
    assert (found[0] == 0.5).all()


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
def test_huge_rows_of_the_hopper_forward_are_right(dtype, head_dim, is_causal, sign):
    """Of many rows a few are huge: those that see one key far above, or far below, the others."""
    hopper = pytest.importorskip("hnf_attention.kernels.hopper.host")
    case = Case(2, 2, 2, 700, 700, head_dim, head_dim, is_causal=is_causal)
    q, k, v, *rest = case.tensors(dtype, "cuda")
    for row in (0, 130, 699):
        q[1, 2, row] = HUGE[dtype]
    k[1, 1, 5] = sign * HUGE[dtype] / 4
    given = case.options(q, k, v, *rest)
    got = hopper.forward(q, k, v, given)[:5]
    exact, rows = reference.attention(*(x.double() for x in (q, k, v)), given)
    # The smallest score is stored as a distance from the largest one: each errs as the larger of the two.
    size = torch.maximum(rows.max_logit.abs(), rows.min_logit.abs()).clamp(min=1)
    for name in FIELDS[1:]:
        error = (got[FIELDS.index(name)].double() - getattr(rows, name)).abs() / size
        assert error.max() <= 2e-5, name
    assert (got[0].double() - exact).abs().max() <= 2e-2
