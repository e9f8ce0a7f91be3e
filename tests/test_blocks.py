"""Rows merged over blocks of keys: what a fold gets of them is what it gets of the whole call."""

import pytest
import torch
from torch import nn

from hnf_attention import AttentionStabilityMonitor, attention, instrument, observe_blocks
from hnf_attention.engine import api, blocks, fold
from hnf_attention.engine.blocks import BlockRows
from hnf_attention.engine.call import check
from hnf_attention.reference.context import Context, hidden_keys
from hnf_attention.reference.measured import measure

BATCH, HEADS, LENGTH, WIDTH = 2, 4, 64, 8


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


MASK = numbers(BATCH, 1, LENGTH, LENGTH, seed=7) > -0.5
MASK[:, :, :, 50:] = False
CASES = {
    "causal, grouped heads": {"pieces": 4},
    "full, sharp": {"sharp": 8.0, "is_causal": False, "pieces": 2},
    "fp64, a sink in the middle": {"dtype": torch.float64, "sink": 37, "kv_heads": 4},
    "bf16, a sink at the end": {"dtype": torch.bfloat16, "sink": 60, "is_causal": False},
    "soft-cap and learned sinks": {"softcap": 5.0, "sinks": numbers(HEADS, seed=5), "kv_heads": 1},
    "a boolean mask": {"attn_mask": MASK, "sink": 20},
    "an additive mask": {
        "attn_mask": torch.where(MASK, numbers(*MASK.shape), -torch.inf),
        "is_causal": False,
    },
    "rows that are left out": {"left_out": numbers(BATCH, LENGTH, seed=6) > 0.3},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_blocks_in_any_order_give_what_the_whole_call_gives(case):
    compare(case, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_blocks_give_what_the_whole_call_gives_on_a_card(case):
    compare(case, "cuda")


def compare(case, device):
    """Rows merged over pieces of a call, in a shuffled order, beside those of the whole call."""
    case = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in case.items()}
    options = {
        "kv_heads": 2,
        "sharp": 2.0,
        "dtype": torch.float32,
        "pieces": 4,
        "sink": None,
        "left_out": None,
    }
    options |= {"is_causal": True, "attn_mask": None, "softcap": None, "sinks": None} | case
    kv_heads, sharp, dtype, pieces, sink, left_out = (
        options.pop(name) for name in ("kv_heads", "sharp", "dtype", "pieces", "sink", "left_out")
    )
    query = (numbers(BATCH, HEADS, LENGTH, WIDTH, seed=1) * sharp).to(device, dtype)
    key, value = (numbers(BATCH, kv_heads, LENGTH, WIDTH, seed=seed).to(device, dtype) for seed in (2, 3))
    if sink is not None:  # a key that all rows of a head are drawn to
        query += 1.0
        key[:, :, sink] += 5.0
    key[0, 0, 3, 0] = torch.nan if dtype == torch.float64 else key[0, 0, 3, 0]
    value[1, 0, 5] = torch.inf
    whole = check(query, key, value, scale=None, window_size=None, **options)
    rows = api.attend(query, key, None, whole)[1]
    hidden = hidden_keys(whole, BATCH, LENGTH, LENGTH)
    output = value.repeat_interleave(HEADS // kv_heads, 1)
    beside = fold.beside(query, key, value, output, rows, whole, left_out)
    expected = measure(query, key, rows, whole, Context(left_out, hidden, *beside))

    merged = BlockRows(query, softcap=whole.softcap, sinks=whole.sinks, left_out=left_out)
    width = LENGTH // pieces
    for number in torch.randperm(pieces**2, generator=torch.Generator().manual_seed(4)).tolist():
        own, other = number // pieces, number % pieces
        if whole.is_causal and other > own:
            continue
        queries, keys = (slice(x * width, (x + 1) * width) for x in (own, other))
        mask = None if whole.attn_mask is None else whole.attn_mask[:, :, queries, keys]
        merged.add(
            key[:, :, keys],
            value[:, :, keys],
            start=keys.start,
            queries=queries,
            is_causal=whole.is_causal and own == other,
            attn_mask=mask,
        )
    got_rows, got = merged.result(output)
    close = {"rtol": 1e-5, "atol": 5e-5, "equal_nan": True}
    for name in ("lse", "entropy", "max_logit", "min_logit", "max_weight"):
        torch.testing.assert_close(getattr(got_rows, name), getattr(rows, name), **close)
    for name in ("visible_keys", "sink_mass", "rest_entropy", "query_square"):
        mine = getattr(got, name)
        real = rows.entropy.isfinite()
        torch.testing.assert_close(mine[real], getattr(expected, name).expand(mine.shape)[real], **close)
    torch.testing.assert_close(
        got.key_square.nan_to_num(-1.0).sort(2)[0], expected.key_square.nan_to_num(-1.0).sort(2)[0]
    )
    assert (got.scale, got.score_kind) == (expected.scale, expected.score_kind)
    for mine, theirs in zip(got.nonfinite, expected.nonfinite):
        assert (
            mine.expand(-1, HEADS, -1).sum((0, 2)).tolist()
            == theirs.expand(-1, HEADS, -1).sum((0, 2)).tolist()
        )
    if sink is not None and not whole.is_causal:
        assert got.sink_mass.mean() > 0.5


def test_a_shared_sink_is_found_however_few_keys_of_a_block_are_kept(monkeypatch):
    query, key = numbers(1, 2, LENGTH, WIDTH) + 1.0, numbers(1, 2, LENGTH, WIDTH, seed=2)
    key[:, :, 40] += 5.0

    def sink_mass():
        merged = BlockRows(query)
        for start in (0, 32):
            merged.add(key[:, :, start : start + 32], start=start)
        return merged.result()[1].sink_mass

    every = sink_mass()
    monkeypatch.setattr(blocks, "KEPT_KEYS", 1)
    assert torch.equal(sink_mass(), every)


def test_blocks_of_huge_scores_are_merged_as_exactly_as_in_double_precision():
    query, key = numbers(1, 1, 32, WIDTH) * 1e3, numbers(1, 1, 32, WIDTH, seed=2)
    merged, wide = BlockRows(query), BlockRows(query.double())
    for start in (16, 0):
        merged.add(key[:, :, start : start + 16], start=start)
        wide.add(key[:, :, start : start + 16].double(), start=start)
    for name in ("entropy", "max_weight"):
        mine, exact = (getattr(rows, name) for rows, _ in (merged.result(), wide.result()))
        torch.testing.assert_close(mine.double(), exact, rtol=0, atol=1e-3)


class Parted(nn.Module):
    """Causal attention in two blocks of keys. fault: what is wrong with the second one."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.fault = {}

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        half = x.shape[1] // 2
        with observe_blocks(q) as call:
            call.add(k[:, :, :half], v[:, :, :half], start=0, queries=slice(half), is_causal=True)
            call.add(k[:, :, :half], v[:, :, :half], start=0, queries=slice(half, None))
            last = {"start": half, "queries": slice(half, None), "is_causal": True} | self.fault
            call.add(k[:, :, half:], v[:, :, half:], **last)
            call.output = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return call.output.transpose(1, 2).flatten(2)


def test_a_module_that_tells_of_its_blocks_is_measured_once_with_all_rows():
    torch.manual_seed(0)
    model, x = Parted(), numbers(BATCH, LENGTH, WIDTH)
    plain = model(x)
    with AttentionStabilityMonitor(model, log_every=2) as monitor:
        for _ in range(2):  # the first step is kept, the second one measured
            assert torch.equal(model(x), plain)
            model(x).sum().backward()
            monitor.on_step()
        (stats,) = monitor.history[0].layers.values()
        coverage = monitor.instrumentation.coverage
    assert stats.rows.tolist() == [2 * BATCH * LENGTH] * 2
    assert "extremes at measured steps only" in coverage.measured[""]
    q, k, v = model.qkv(x).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
    rows = attention(q, k, v, is_causal=True)[1]
    torch.testing.assert_close(
        torch.tensor(stats.entropy, dtype=torch.float32), rows.entropy.mean((0, 2)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    "fault, error, message",
    [
        ({"start": -1}, ValueError, "expected start to be an int >= 0, got -1"),
        ({"start": 1.5}, ValueError, "expected start to be an int >= 0, got 1.5"),
        ({"queries": [1]}, TypeError, "expected queries to be a slice of step 1"),
        ({"queries": slice(0, 8, 2)}, TypeError, "expected queries to be a slice of step 1"),
        ({"rows": 3}, TypeError, "expected rows to be RowStats or None, got int"),
        ({"is_causal": 1}, TypeError, "expected is_causal to be a bool"),
    ],
)
def test_a_wrong_block_is_an_error_whether_or_not_it_is_measured(fault, error, message):
    model, x = Parted(), numbers(1, 16, WIDTH)
    model.fault = fault
    for mode in (False, True):
        handle = instrument(model) if mode else None
        with pytest.raises(error, match=message):
            model(x)
        if handle is not None:
            handle.restore()


def test_queries_of_another_shape_are_an_error():
    with (
        pytest.raises(ValueError, match=r"expected query of shape .* got \(2, 3\)"),
        observe_blocks(torch.ones(2, 3)),
    ):
        pass


def test_a_call_without_blocks_is_listed():
    class Empty(Parted):
        def forward(self, x):
            with observe_blocks(x[:, None]):
                return x

    with instrument(model := Empty()) as handle:
        model(numbers(1, 16, WIDTH))
        assert handle.coverage.not_measured[""] == "no block of keys was seen"
