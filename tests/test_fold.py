"""The fold kernel against its specification: interpreter on the CPU, for real on a GPU."""

from dataclasses import replace

import pytest
import torch
from cases import CASES, Case, cases_with, random_cases
from hypothesis import given, settings

from hnf_attention import attention_stats
from hnf_attention.engine import fold
from hnf_attention.reference import attention as reference
from hnf_attention.reference import fold as specification
from hnf_attention.reference import measured
from hnf_attention.reference.context import LEAST_ROWS, SHARED_ROWS, UNKNOWN, Context
from hnf_attention.statistics import fields

pytest.importorskip("triton", reason="Triton kernels need Linux")
from hnf_attention.kernels.measure import columns
from hnf_attention.kernels.measure import fold as kernel

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
SLOW = pytest.mark.slow
SLOTS = 3  # fewer than there are blocks of rows, so that programs walk several
COUNTS = [
    "rows",
    "judged_rows",
    "left_out_rows",
    "empty_rows",
    "saturated_rows",
    "stray_rows",
    "judged_blocks",
    "sequences",
    *(name for name in fields.SUM_FIELDS if name.startswith("nonfinite")),
]


def _rows(q, k, options):
    return reference.attention(q.float(), k.float(), None, options)[1]


def _check(q, k, options, slots=SLOTS, rows=None, context=UNKNOWN):
    """Two calls folded by the kernel and by the specification; returns the kernel's accumulator."""
    rows = _rows(q, k, options) if rows is None else rows
    expected = specification.new_accumulator(q.shape[1], q.device)
    got = expected.repeat(slots, 1, 1)
    for _ in range(2):  # the second call adds to the first
        specification.fold_rows(expected, rows, measured.measure(q, k, rows, options, context))
        kernel.fold(got, q, k, rows, options, context, fold.kernel_layout())
    together = fold.collect([got])
    for name in COUNTS:
        index = fields.SUM_FIELDS.index(name)
        assert torch.equal(together[index], expected[index]), name
    # A ratio on the edge of two bins may fall to either side; nothing else may move.
    bins = slice(len(fields.SUM_FIELDS), fields.NUM_SUMS)
    assert (together[bins] - expected[bins]).abs().sum() <= 4
    together[bins] = expected[bins]
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-5)
    return got


def _context(q, k, continues=False, seed=0):
    """A context with something in each field: padding, sinks, values and outputs that are not finite."""
    generator = torch.Generator().manual_seed(seed)
    (batch, heads, num_queries, _), (kv_heads, num_keys) = q.shape, k.shape[1:3]

    def random(*shape):
        return torch.rand(shape, generator=generator).to(q.device)

    broken = torch.tensor([torch.nan, torch.inf], device=q.device)
    value, out = random(batch, kv_heads, num_keys), random(batch, num_queries, heads).transpose(1, 2)
    value[0, 0, num_keys // 2], out[0, -1, num_queries // 2] = broken
    shared = (random(batch, heads) * (num_keys + 1)).long() - 1
    return Context(
        random(batch, num_queries) < 0.3, random(batch, num_keys) < 0.3, shared, value, out, continues
    )


@pytest.mark.parametrize(("case", "dtype"), cases_with([torch.float32, torch.float16, torch.bfloat16]))
def test_every_option(case, dtype, device):
    tensors = case.tensors(dtype, device)
    q, k = tensors[:2]
    context = UNKNOWN if dtype == torch.float16 else _context(q, k)
    _check(q, k, case.options(*tensors), context=context)


@pytest.mark.slow
@settings(max_examples=8, deadline=None, derandomize=True)
@given(case=random_cases())
def test_anywhere(case):
    tensors = case.tensors(device=DEVICE)
    q, k = tensors[:2]
    _check(q, k, case.options(*tensors), context=_context(q, k))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["causal window", "additive mask", *(pytest.param(x, marks=SLOW) for x in ("causal", "bool mask"))],
)
def test_more_rows_than_a_block_and_more_keys_than_a_scan(name, device):
    case = replace(CASES[name], batch=2, kv_heads=1, num_queries=100, num_keys=1100, window_size=None)
    if name == "causal window":
        case = replace(case, window_size=70)
    tensors = case.tensors(device=device)
    _check(*tensors[:2], case.options(*tensors))


@pytest.mark.parametrize(
    ("name", "phase"),
    [
        pytest.param(
            name, 2 * (i % 2), marks=() if name in ("causal", "empty rows", "packed causal") else SLOW
        )
        for i, name in enumerate(CASES)
    ],
)
def test_a_sample_of_rows(name, phase, device):
    case = replace(CASES[name], num_queries=140, num_keys=40, window_size=None)  # three blocks
    case = replace(case, batch=1, kv_heads=1, group=2)
    if CASES[name].window_size is not None:
        case = replace(case, window_size=25)
    if case.seqlens is not None:
        pack = (*(3 * edge for edge in case.seqlens[:-1]), 130)
        case = replace(case, num_keys=140, seqlens=pack)
    tensors = case.tensors(device=device)
    q, k = tensors[:2]
    q[0, 0, :65] = torch.nan  # two blocks at least, so that a sample has something of it
    rows = attention_stats(q, k, sample=(3, phase), **case.keywords(*tensors[3:]))
    assert (rows.row_index < 0).any() or phase == 0
    _check(q, k, case.options(*tensors), rows=rows, context=_context(q, k) if phase else UNKNOWN)


@pytest.mark.parametrize(
    ("head_dim", "sample"),
    [
        (70, (2, 1)),
        (200, None),
        *(pytest.param(*x, marks=SLOW) for x in ((70, None), (128, None), (128, (2, 1)), (200, (2, 1)))),
    ],
)
def test_wide_heads(head_dim, sample, device):
    case = Case(1, 1, 2, 150, 90, head_dim, is_causal=True)
    tensors = case.tensors(device=device)
    rows = attention_stats(*tensors[:2], sample=sample, **case.keywords(*tensors[3:]))
    _check(*tensors[:2], case.options(*tensors), rows=rows)


@pytest.mark.parametrize("name", ["causal", "empty rows", "causal window"])
def test_rows_that_nan_or_inf_reached_are_counted_only(name, device):
    case = replace(CASES[name], batch=2, num_queries=60, num_keys=50)
    tensors = case.tensors(device=device)
    q, k = tensors[:2]
    q[0, 0, 5] = torch.nan
    q[1, 1, 40, 2] = torch.inf
    k[1, 0, 30] = torch.nan
    got = fold.collect([_check(q, k, case.options(*tensors))])
    assert got[fields.SUM_FIELDS.index("nonfinite_rows")].sum() > 2
    assert not got.isnan().any()


def test_a_call_that_continues_adds_its_new_keys(device):
    case = Case(2, 1, 2, 5, 90, is_causal=False)
    tensors = case.tensors(device=device)
    q, k = tensors[:2]
    got = fold.collect([_check(q, k, case.options(*tensors), context=_context(q, k, continues=True))])
    assert not got[fields.SUM_FIELDS.index("sequences")].any()


@pytest.mark.parametrize(("case", "dtype"), cases_with([torch.float32, torch.float16]))
def test_the_weight_of_each_key(case, dtype, device):
    tensors = case.tensors(dtype, device)
    q, k = tensors[:2]
    options, rows = case.options(*tensors), _rows(q, k, case.options(*tensors))
    every_row = dtype == torch.float16 and case.num_queries >= LEAST_ROWS
    left_out = None if every_row else _context(q, k).left_out
    index, lse = measured.rows_asked(q, rows, left_out)
    if left_out is None:
        got = columns.column_weights(q, k, rows.lse, options, SHARED_ROWS)
    else:
        got = columns.column_weights(q, k, lse, options, SHARED_ROWS, index)
    part = reference.score_rows(q.double(), k.double(), index, options)
    weights = torch.where(part.seen, (part.scores - lse.double()[..., None]).exp(), 0.0)
    torch.testing.assert_close(got.double(), weights.sum(2), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mask_shape", [(1, 1, 1, 23), (2, 1, 1, 23), (1, 2, 1, 23), (1, 1, 19, 1)])
@pytest.mark.parametrize("is_causal", [pytest.param(False, marks=SLOW), True])
def test_masks_that_broadcast(mask_shape, is_causal, device):
    case = Case(2, 1, 2, is_causal=is_causal)
    q, k, v, _, _ = case.tensors(device=device)
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(mask_shape, generator=generator).to(device)
    for kind in (mask > 0.3, torch.where(mask > 0.3, mask, -torch.inf)):
        _check(q, k, case.options(q, k, v, kind, None))


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0)])
def test_zero_lengths(shape, device):
    batch, num_queries, num_keys = shape
    case = Case(batch=batch, num_queries=num_queries, num_keys=num_keys)
    tensors = case.tensors(device=device)
    q, k, options = *tensors[:2], case.options(*tensors)
    accumulator = fold.new_accumulator(q.shape[1], q.device)
    blank = accumulator.clone()
    fold.fold(accumulator, q, k, _rows(q, k, options), options)
    if num_keys == 0:  # five empty rows in each of two sequences
        blank[0, fields.SUM_FIELDS.index("sequences")] = 2
        blank[0, fields.SUM_FIELDS.index("empty_rows")] = 10
        squares = q.double().square().sum(3)
        blank[0, fields.SUM_FIELDS.index("query_square")] = squares.sum((0, 2))
        tops = {"query_square": options.scale**2 * squares.amax((0, 2)), "num_keys": 0, "score_kind": 0}
        for name, value in tops.items():
            blank[0, fields.NUM_SUMS + fields.MAX_FIELDS.index(name)] = value
    together = fold.collect([accumulator])
    torch.testing.assert_close(together, fold.collect([blank]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("stride", ["inner", "expanded", "offset", "sliced"])
def test_any_strides(stride, device):
    tensors = Case(group=1).tensors(device=device)
    q, k = tensors[:2]
    options = Case(group=1).options(*tensors)
    views = {
        "inner": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": lambda x: x[:1].expand(x.shape),
        "offset": lambda x: torch.cat([x[..., :1], x], -1)[..., 1:],
        "sliced": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    }
    q, k = (views[stride](x) for x in (q, k))
    rows = _rows(q, k, options)
    got, expected = (specification.new_accumulator(q.shape[1], device).repeat(SLOTS, 1, 1) for _ in range(2))
    kernel.fold(got, q, k, rows, options, UNKNOWN, fold.kernel_layout())
    dense = (x.clone(memory_format=torch.contiguous_format) for x in (q, k))
    kernel.fold(expected, *dense, rows, options, UNKNOWN, fold.kernel_layout())
    # On a card other strides and alignments compile to other loads, and sums of squares to another order.
    torch.testing.assert_close(got, expected, rtol=1e-6 if ON_GPU else 0.0, atol=0.0)


@pytest.mark.slow
def test_the_same_bits_every_time(device):
    length = 700 if ON_GPU else 150
    case = Case(batch=2, num_queries=length, num_keys=length, head_dim=64, is_causal=True)
    tensors = case.tensors(device=device)
    q, k, options = *tensors[:2], case.options(*tensors)
    rows = _rows(q, k, options)
    blank = specification.new_accumulator(q.shape[1], device).repeat(kernel.SLOTS, 1, 1)
    first = blank.clone()
    kernel.fold(first, q, k, rows, options, UNKNOWN, fold.kernel_layout())
    for _ in range(50 if ON_GPU else 1):
        again = blank.clone()
        kernel.fold(again, q, k, rows, options, UNKNOWN, fold.kernel_layout())
        assert torch.equal(again, first)


def test_collect_joins_layers_of_different_width(device):
    parts = [specification.new_accumulator(heads, device).repeat(3, 1, 1) for heads in (2, 5)]
    for number, part in enumerate(parts):
        part[0, 0] = 1 + number
        part[2, 0] = 10
        part[1, fields.NUM_SUMS] = -3.0
    together = fold.collect(parts)
    assert together.shape == (fields.NUM_FOLDED, 7)
    assert together[0].tolist() == [11, 11, 12, 12, 12, 12, 12]
    assert together[fields.NUM_SUMS].tolist() == [-3.0] * 7
    assert (together[fields.NUM_SUMS + 1] == -torch.inf).all()


def test_a_device_without_fp64_loses_nothing(monkeypatch):
    """Of many calls, the sums in pairs of fp32 are as good as one in fp64; fp32 alone would lose digits."""
    q, k = (torch.randn(1, 2, 20, 8) for _ in range(2))
    options = Case().options(q, k, k, None, None)
    rows = _rows(q, k, options)
    beside = measured.measure(q, k, rows, options)
    expected = fold.new_accumulator(2, q.device)
    fold.fold_measured(expected, rows, beside)
    monkeypatch.setattr(specification, "wide", lambda device: torch.float32)
    pairs, calls = fold.new_accumulator(2, q.device), 400
    assert pairs.dtype == torch.float32 and pairs.shape[0] == 2
    for _ in range(calls):
        fold.fold_measured(pairs, rows, beside)
    sums = slice(0, fields.NUM_SUMS)
    got, one = fold.collect([pairs]), fold.collect([expected])
    torch.testing.assert_close(got[sums], calls * one[sums], rtol=3e-7, atol=1e-6)
    torch.testing.assert_close(got[fields.NUM_SUMS :], one[fields.NUM_SUMS :], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["plain", "one query", pytest.param("window", marks=SLOW), pytest.param("empty rows", marks=SLOW)]
)
def test_what_the_fold_reads_beside_the_rows_by_one_launch(name, device):
    case = CASES[name]
    tensors = case.tensors(device=device)
    q, k, v = tensors[:3]
    options, rows = case.options(*tensors), _rows(q, k, case.options(*tensors))
    v[0, 0, 3, 1], k[0, 0, :, 0] = torch.inf, k[0, 0, :, 0] * 9
    out = torch.randn(*q.shape[:3], v.shape[3], device=device).transpose(2, 3).contiguous().transpose(2, 3)
    out[0, 1, 0, 0] = torch.nan
    for known in (out, None):
        left_out = (
            None if known is None else torch.arange(q.shape[2], device=device).expand(q.shape[0], -1) < 2
        )
        shared, values, outputs = fold.beside_by_kernels(q, k, v, known, rows, options, left_out)
        assert torch.equal(shared, fold.shared_key(q, k, rows, options, left_out))
        assert torch.equal(values.isfinite(), v.isfinite().all(-1))
        assert outputs is None if known is None else torch.equal(outputs.isfinite(), out.isfinite().all(-1))
