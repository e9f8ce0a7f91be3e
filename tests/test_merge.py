"""Splitting the keys and merging the parts against one pass over all of them."""

from dataclasses import fields, replace

import pytest
import torch
from cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st

from hnf_attention import RowStats, attention, attention_stats, merge_attention
from hnf_attention.reference.masks import visible

MERGED = [field.name for field in fields(RowStats) if field.name != "sink_mass"]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


@st.composite
def splits(draw):
    """A call, and its keys dealt to 2-8 blocks in any order, some of which may get none."""
    case = Case(
        batch=1,
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 2)),
        num_queries=draw(st.integers(1, 12)),
        num_keys=draw(st.integers(1, 24)),
        is_causal=draw(st.booleans()),
        window_size=draw(st.none() | st.integers(1, 20)),
        softcap=draw(st.none() | st.floats(0.5, 20.0)),
        sinks=draw(st.booleans()),
        mask=draw(st.sampled_from([None, "rows", "additive"])),
        scale=draw(st.none() | st.floats(-1.0, 1.0)),
        seed=draw(st.integers(0, 2**20)),
    )
    num_blocks = draw(st.integers(2, 8))
    owners = draw(st.lists(st.integers(0, num_blocks - 1), min_size=case.num_keys, max_size=case.num_keys))
    return case, [[j for j, owner in enumerate(owners) if owner == block] for block in range(num_blocks)]


def parts_of(case, blocks, q, k, v, mask, extended=True):
    """(out, rows) of each block of keys; what hides keys by position is given as a mask."""
    options = case.options(q, k, v, mask, None)
    seen = visible(slice(0, q.shape[2]), k.shape[2], options, q.device)
    additive = mask is not None and mask.dtype != torch.bool
    keep = torch.where(seen, mask, -torch.inf) if additive else seen
    keywords = {"scale": case.scale, "softcap": case.softcap, "extended": extended}
    return [
        attention(q, k[:, :, block], v[:, :, block], attn_mask=keep[..., block], **keywords)
        for block in blocks
    ]


def assert_same(got, expected, tolerance):
    for name in MERGED:
        actual, wanted = getattr(got, name), getattr(expected, name)
        assert (actual is None) == (wanted is None), name
        if actual is not None:
            torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(split=splits())
def test_merged_blocks_equal_one_pass(dtype, split):
    case, blocks = split
    q, k, v, mask, sinks = case.tensors(dtype)
    expected_out, expected = attention(q, k, v, extended=True, **case.keywords(mask, sinks))
    out, rows = merge_attention(parts_of(case, blocks, q, k, v, mask), sinks=sinks)
    assert out.dtype == dtype and rows.lse.dtype == dtype
    torch.testing.assert_close(out, expected_out, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert_same(rows, expected, TOLERANCE[dtype])
    assert rows.sink_mass is None


@settings(max_examples=25, deadline=None, derandomize=True)
@given(split=splits())
def test_merging_is_associative_and_commutative(split):
    case, blocks = split
    q, k, v, mask, sinks = case.tensors(torch.float64)
    parts = parts_of(case, blocks, q, k, v, mask)
    out, rows = merge_attention(parts)
    shuffled_out, shuffled = merge_attention(parts[::-1])
    torch.testing.assert_close(shuffled_out, out)
    assert_same(shuffled, rows, 1e-12)
    left, right = parts[0], parts[-1]
    for index in range(1, len(parts)):
        left = merge_attention([left, parts[index]])
        right = merge_attention([parts[-1 - index], right])
    for one_by_one_out, one_by_one in (left, right):
        torch.testing.assert_close(one_by_one_out, out)
        assert_same(one_by_one, rows, 1e-11)
    # A sink is added once, at the end or beside the blocks.
    late = merge_attention([left], sinks=sinks)
    at_once = merge_attention(parts, sinks=sinks)
    torch.testing.assert_close(late[0], at_once[0])
    assert_same(late[1], at_once[1], 1e-11)


def test_a_ring_over_causal_blocks_equals_one_pass(device):
    """What each rank of a ring does: its own block is causal, earlier ones are whole, later ones left out."""
    case = Case(num_queries=72, num_keys=72, is_causal=True, sinks=True)
    q, k, v, _, sinks = case.tensors(device=device)
    expected_out, expected = attention(q, k, v, extended=True, **case.keywords(None, sinks))
    places = [slice(start, start + 24) for start in (0, 24, 48)]
    for rank, own in enumerate(places):
        parts = [
            attention(q[:, :, own], k[:, :, part], v[:, :, part], is_causal=part is own, extended=True)
            for part in places[: rank + 1]
        ]
        out, rows = merge_attention(parts, sinks=sinks)
        torch.testing.assert_close(out, expected_out[:, :, own], rtol=2e-5, atol=2e-5)
        assert_same(rows, cut(expected, lambda x, own=own: x[:, :, own]), 2e-5)


def cut(rows, part):
    values = {name: getattr(rows, name) for name in MERGED}
    return RowStats(**{name: None if value is None else part(value) for name, value in values.items()})


def test_samples_of_the_same_rows_merge_and_others_do_not(device):
    q, k, *_ = Case(num_queries=200).tensors(device=device)
    keywords = {"extended": True, "sample": (2, 1)}
    expected = attention_stats(q, k, **keywords)
    first, second = (attention_stats(q, part, **keywords) for part in (k[:, :, :9], k[:, :, 9:]))
    assert_same(second.merge(first), expected, 2e-5)
    assert torch.equal(first.merge(second).row_index, expected.row_index)
    with pytest.raises(ValueError, match="blocks of the same rows, got different samples"):
        first.merge(
            RowStats(*(getattr(second, name) for name in ("lse", "entropy", "max_logit", "min_logit")))
        )
    if device == "cpu":
        with pytest.raises(ValueError, match="blocks of the same rows, got different samples"):
            first.merge(attention_stats(q, k[:, :, 9:], sample=(2, 0)))


def test_empty_blocks_are_the_identity():
    q, k, v, *_ = Case().tensors(torch.float64)
    out, rows = attention(q, k, v, extended=True)
    nothing = attention(q, k[:, :, :0], v[:, :, :0], extended=True)
    merged_out, merged = merge_attention([nothing, (out, rows), nothing])
    torch.testing.assert_close(merged_out, out, rtol=0, atol=0)
    assert_same(merged, rows, 1e-14)
    assert_same(nothing[1].merge(nothing[1]), nothing[1], 0)


def test_entropy_and_variance_do_not_cancel_at_large_scores():
    """Scores near 1e4 that lie a few nats apart: lse - E[s] in fp32 would be off by 1e-3 and more."""
    torch.manual_seed(0)
    offsets = torch.randint(0, 64, (64,)).float() / 16
    q, k = torch.ones(1, 1, 1, 2), torch.stack([torch.full((64,), 1e4), offsets], 1)[None, None]
    exact = attention(q.double(), k.double(), k.double(), scale=1.0, extended=True)[1]
    halves = [attention(q, half, half, scale=1.0, extended=True)[1] for half in k.chunk(2, 2)]
    merged = RowStats.merge(*halves)
    # What is left is the rounding of the two lse, 5e-4 each, on a function that is flat in them.
    for name in ("entropy", "logit_var", "collision", "score_std"):
        difference = getattr(merged, name).double() - getattr(exact, name)
        assert difference.abs() <= 1e-3 * getattr(exact, name), name


def test_shares_far_below_the_largest_do_no_harm():
    def block(level):
        row = torch.full((1, 1, 1), level)
        zero = torch.zeros(1, 1, 1)
        one = torch.ones(1, 1, 1, dtype=torch.int64)
        return RowStats(row, zero, row, row, zero, zero + 1, zero, None, row, visible_keys=one)

    merged = block(3.0).merge(block(-1e30), block(-200.0))
    assert merged.lse == 3.0 and merged.entropy == 0.0 and merged.logit_var == 0.0 and merged.collision == 1.0
    assert merged.min_logit == -1e30 and merged.visible_keys == 3


def test_a_row_that_nan_reached_in_one_block_is_nan_and_no_other_is():
    q, k, v, *_ = Case(1, 1, 1).tensors()
    k[0, 0, 2] = torch.nan
    hidden = torch.ones(19, 23, dtype=torch.bool)
    hidden[:7, 2] = False
    keywords = {"extended": True}
    parts = [
        attention(q, k[:, :, part], v[:, :, part], attn_mask=hidden[:, part], **keywords)
        for part in (slice(0, 10), slice(10, 23))
    ]
    broken = (torch.arange(19) >= 7)[None, None]
    _, rows = merge_attention(parts)
    for name in ("lse", "entropy", "max_logit", "min_logit", "logit_var", "collision", "score_std"):
        assert torch.equal(getattr(rows, name).isnan(), broken), name


@pytest.mark.parametrize("sunk", [False, True])
def test_gradients_are_those_of_one_pass(sunk):
    case = Case(is_causal=True, sinks=sunk)
    q, k, v, _, sinks = case.tensors(torch.float64)
    sinks = sinks.double() if sunk else None
    leaves = [x.requires_grad_() for x in (q, k, v, sinks) if x is not None]
    blocks = [list(range(0, 9)), list(range(9, 10)), list(range(10, 23))]
    results = []
    for out, rows in (
        attention(q, k, v, is_causal=True, sinks=sinks),
        merge_attention(parts_of(case, blocks, q, k, v, None, extended=False), sinks=sinks),
    ):
        loss = out.square().sum() + rows.lse.sin().sum() + rows.entropy.square().sum()
        results.append(torch.autograd.grad(loss, leaves))
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected)


@pytest.mark.slow
def test_compiles_to_a_full_graph():
    q, k, v, _, sinks = Case(sinks=True).tensors()
    leaves = [x.requires_grad_() for x in (q, k, v, sinks)]

    def loss(q, k, v, sinks):
        parts = [attention(q, *block) for block in zip(k.chunk(3, 2), v.chunk(3, 2))]
        out, rows = merge_attention(parts, sinks=sinks)
        return out.square().sum() + rows.entropy.sum()

    expected = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for actual, wanted in zip(got, expected):
        torch.testing.assert_close(actual, wanted)


def test_rows_that_no_block_sees_get_a_gradient_of_zero():
    q, k, v, *_ = Case().tensors(torch.float64)
    mask = torch.ones(19, 23, dtype=torch.bool)
    mask[3] = False
    q.requires_grad_()
    parts = [
        attention(q, k[:, :, part], v[:, :, part], attn_mask=mask[:, part])
        for part in (slice(0, 5), slice(5, 23))
    ]
    out, rows = merge_attention(parts)
    assert (rows.lse[:, :, 3] == -torch.inf).all()
    (out.sum() + rows.entropy.sum()).backward()
    assert q.grad.isfinite().all() and not q.grad[:, :, 3].any()


def test_a_field_that_some_block_lacks_is_lacking():
    q, k, v, *_ = Case().tensors()
    core, extended = (attention(q, k, v, extended=e)[1] for e in (False, True))
    assert core.merge(extended).collision is None
    merged = extended.merge(replace(extended, score_mean=None))
    assert merged.score_std is None and merged.collision is not None and merged.visible_keys is not None


def test_partial_outputs_merge_in_the_widest_dtype():
    q, k, v, *_ = Case().tensors(torch.float16)
    out, rows = attention(q, k, v)
    assert merge_attention([(out, rows), (out, rows)])[0].dtype == torch.float16
    assert merge_attention([(out.float(), rows), (out, rows)])[0].dtype == torch.float32


def test_errors():
    q, k, v, *_ = Case().tensors()
    out, rows = attention(q, k, v)
    other = attention(q[:, :, :5], k, v)
    double = attention(*(x.double() for x in (q, k, v)))
    with pytest.raises(ValueError, match="at least one key block to merge, got none"):
        merge_attention([])
    with pytest.raises(ValueError, match=r"blocks of shape \(2, 4, 19\), got \(2, 4, 5\)"):
        rows.merge(other[1])
    with pytest.raises(TypeError, match=r"blocks of dtype torch.float32, got torch.float64"):
        merge_attention([(out, rows), double])
    with pytest.raises(TypeError, match="blocks to be RowStats, got Tensor"):
        rows.merge(out)
    with pytest.raises(ValueError, match=r"outputs of shape \(2, 4, 19, 16\), got \(2, 4, 19, 8\)"):
        merge_attention([(out, rows), (out[..., :8], rows)])
    with pytest.raises(ValueError, match=r"sinks of shape \(heads,\) = \(4,\), got \(3,\)"):
        rows.merge(rows, sinks=torch.zeros(3))
