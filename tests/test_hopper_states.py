"""The Hopper forward's states under masks, step by step in PyTorch: rows that see no key of a tile, or none at all.

Gluon has no interpreter. The steps of `kernels.hopper.steps` and of `_finish` in `kernels.hopper.kernel` stand here
once more, with the rounding of the card. What they begin and end with is the kernel's own.
"""

import pytest
import torch
from cases import Case, oracle

from hnf_attention.reference import masks as reference

pytest.importorskip("triton", reason="Triton kernels need Linux")
import triton
import triton.language as tl
from test_hopper_spans import spans_of

from hnf_attention.kernels.hopper.assembly import HIDDEN
from hnf_attention.kernels.hopper.host import FLOOR
from hnf_attention.kernels.hopper.plan import BLOCK_M, BLOCK_N
from hnf_attention.kernels.shared.plan import score_plan
from hnf_attention.kernels.shared.softmax import LOG2_E, State, Units, softmax_finish

SCALE = 0.25  # of head dimension 16


def fused(a, b, c):
    """a * b + c with one rounding."""
    return (a.double() * b.double() + c.double()).float()


def smallest(t):
    """The number whose bits are the largest unsigned integer, of each row."""
    bits = (t.contiguous().view(torch.int32).long() & 0xFFFFFFFF).amax(1)
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).int().view(torch.float32)


def step(s, state, unit, floor, masked):
    """`steps.softmax`, and what rescales the output; also exp2(t)."""
    m, l, w, low = state  # noqa: E741
    m_new = torch.fmax(m, s.nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(1))
    t = fused(s, unit, -(m_new * unit)[:, None])
    p, d = t.exp2(), (m - m_new) * unit
    alpha = d.exp2()
    w, low = alpha * (w + l * d), low + d
    if masked:
        t = torch.where(t == torch.tensor(HIDDEN.value) * unit, 0.0, t)
    low = torch.fmin(low, smallest(t))
    if masked:
        low = torch.where(m_new == floor, torch.inf, low)
    return (m_new, l * alpha + p.sum(1), w + (p * t).sum(1), low), p, alpha


@triton.jit
def _finish_rows(rows_ptr, unit, scale, sink, SINKS: tl.constexpr, SIZE: tl.constexpr):
    """Rows (4, SIZE) of m, l, w and low become lse, entropy, largest and smallest score."""
    at = rows_ptr + tl.arange(0, SIZE)
    state = State(tl.load(at), tl.load(at + SIZE), tl.load(at + 2 * SIZE), tl.load(at + 3 * SIZE), ())
    units = Units(unit, unit, float("inf"))
    core, _, normalise = softmax_finish(state, units, scale, sink, SINKS, False, False)
    for field in tl.static_range(4):
        tl.store(at + field * SIZE, core[field])
    tl.store(at + 4 * SIZE, normalise)


def finished(state, number, unit, sink):
    """`_finish`: the four statistics, and what normalises the output."""
    m, l, w, low = state  # noqa: E741
    empty = number == 0
    least = torch.where(empty, torch.inf, m + low.clamp(max=0.0) / unit)
    rows = torch.zeros(5, BLOCK_M)
    rows[:4, : len(m)] = torch.stack([torch.where(empty, -torch.inf, m), l, w, least])
    raw = 0.0 if sink is None else float(sink / SCALE)
    _finish_rows[(1,)](rows, float(unit), SCALE, raw, sink is not None, BLOCK_M)
    return rows[:, : len(m)]


def hidden_unless_seen(s, first, number, tile):
    """`steps.hide`."""
    columns = torch.arange(tile * BLOCK_N, (tile + 1) * BLOCK_N)[None, :]
    distance = (columns - first[:, None]) & 0xFFFFFFFF
    return torch.where(distance < number[:, None], s, torch.tensor(HIDDEN.value))


def block_rows(case, scores, values, start, sink):
    """The statistics and the output of one block of queries of one head, by the kernel's steps."""
    unit = torch.tensor(SCALE * LOG2_E.value)
    floor = torch.tensor(FLOOR / (SCALE * LOG2_E.value))
    rows = torch.arange(start, min(start + BLOCK_M, case.num_queries))
    options = case.options(*case.tensors())
    seen = reference.sees(rows[:, None], torch.arange(case.num_keys)[None, :], case.num_keys, options)
    number = seen.sum(1)
    first = torch.where(number > 0, seen.int().argmax(1), 7)
    lo, full_lo, full_hi, hi = spans_of(
        [(start, int(rows[-1]), case.num_keys, case.window_size)], score_plan(options)
    )[0]
    zeros = torch.zeros(len(rows))
    state = (zeros + floor, zeros, zeros, zeros + torch.inf)
    out = torch.zeros(len(rows), values.shape[1])
    for tile in reversed(range(lo, hi)):
        inside = slice(tile * BLOCK_N, (tile + 1) * BLOCK_N)
        s, v = scores[rows, inside], values[inside]
        padding = BLOCK_N - s.shape[1]  # what is beyond the keys is copied as zeros
        s, v = torch.nn.functional.pad(s, (0, padding)), torch.nn.functional.pad(v, (0, 0, 0, padding))
        masked = not full_lo <= tile < full_hi
        if masked:
            s = hidden_unless_seen(s, first, number, tile)
        state, p, alpha = step(s, state, unit, floor, masked)
        out = out * (1.0 if tile == hi - 1 else alpha[:, None]) + p @ v
    *statistics, normalise = finished(state, number, unit, sink)
    return statistics, out * normalise[:, None]


CASES = {
    "both sides": Case(1, 1, 1, 300, 300, window_size=20),
    "causal": Case(1, 1, 1, 400, 400, window_size=129, is_causal=True, sinks=True),
    "rows without a key": Case(1, 1, 1, 420, 100, window_size=60, sinks=True),
    "rows without a key or a sink": Case(1, 1, 1, 390, 130, window_size=30),
    "more keys": Case(1, 1, 1, 130, 500, window_size=200, spread=30.0),
}


def check_case(case):
    tensors = case.tensors()
    q, k, v, _, sinks = tensors
    wanted = [x[0, 0] for x in oracle(case, *tensors)]
    scores = q[0, 0] @ k[0, 0].T
    for start in range(0, case.num_queries, BLOCK_M):
        statistics, out = block_rows(case, scores, v[0, 0], start, None if sinks is None else sinks[0])
        rows = slice(start, start + BLOCK_M)
        for got, true in zip((out, *statistics), wanted, strict=True):
            torch.testing.assert_close(got.double(), true[rows], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "rows without a key" else pytest.mark.slow) for name in CASES],
)
def test_states_agree_with_the_oracle(name):
    check_case(CASES[name])


def test_an_infinite_visible_score_makes_its_row_nan_and_a_hidden_one_does_not():
    case = Case(1, 1, 1, 128, 256, window_size=40)
    scores = torch.zeros(128, 256)
    scores[5, 30] = -torch.inf  # visible
    scores[6, 100] = torch.inf  # hidden
    scores[7, 20] = torch.inf
    statistics, out = block_rows(case, scores, torch.ones(256, 16), 0, None)
    broken = torch.zeros(128, dtype=torch.bool)
    broken[[5, 7]] = True
    for row in statistics:
        assert torch.equal(row.isnan(), broken)
    assert not out[~broken].isnan().any()
