"""The probe against the fp64 oracle and the reference: all rows, and samples of them."""

from dataclasses import replace

import pytest
import torch
from cases import CASES, EXTENDED, Case, cases_with, close, extended_oracle, oracle, random_cases
from hypothesis import given, settings
from hypothesis import strategies as st

from hnf_attention import attention, attention_stats
from hnf_attention.reference import attention as reference
from hnf_attention.reference import masks, sampling
from hnf_attention.reference.measured import measure

pytest.importorskip("triton", reason="Triton kernels need Linux")
from hnf_attention.kernels.portable import probe
from hnf_attention.kernels.shared.tiles import Tiles

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if ON_GPU else [])
TILES = None if ON_GPU else Tiles(16, 16, 4, 1)
NAMES = ("lse", "entropy", "max_logit", "min_logit", *EXTENDED)
# Five blocks of rows: strata of two or three, the last one short, its last block too.
LONG = Case(batch=2, kv_heads=1, group=2, num_queries=290, num_keys=70)


def _check(case, dtype, device):
    tensors = case.tensors(dtype, device)
    options = case.options(*tensors)
    expected = (*oracle(case, *tensors)[1:], *extended_oracle(case, *tensors))
    *core, nothing, index = probe.probe(*tensors[:2], options, TILES)
    assert nothing is None and index is None
    *again, more, _ = probe.probe(*tensors[:2], options, TILES, extended=True)
    for name, actual, wanted in zip(NAMES, (*again, *more), expected, strict=True):
        assert actual.dtype == torch.float32
        close(actual, wanted, 2e-5, name)
    for name, actual, wanted in zip(NAMES, core, expected):
        close(actual, wanted, 2e-5, name)


@pytest.mark.parametrize(("case", "dtype"), cases_with(DTYPES))
def test_all_rows_match_the_oracle(case, dtype, device):
    _check(case, dtype, device)


@pytest.mark.slow
@settings(max_examples=7, deadline=None, derandomize=True)
@given(case=random_cases())
def test_all_rows_match_the_oracle_anywhere(case):
    _check(case, torch.float32, DEVICE)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("plain", torch.float16),
        *((name, torch.float32) for name in ("causal", "causal window", "softcap", "empty rows")),
        *((name, torch.float32) for name in ("additive mask", "packed everything")),
    ],
)
def test_keys_split_over_programs_give_the_same(name, dtype, device):
    """Into more parts than some rows see tiles: those have parts without a key."""
    case = CASES[name]
    tensors = case.tensors(dtype, device)
    options = case.options(*tensors)
    core = probe.probe(*tensors[:2], options, TILES, parts=3)[:4]
    for name, actual, wanted in zip(NAMES, core, oracle(case, *tensors)[1:]):
        close(actual, wanted, 2e-5, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"is_causal": True, "num_keys": 290}, marks=pytest.mark.slow),
        {"mask": "rows", "sinks": True},
    ],
    ids=str,
)
def test_a_sample_whose_keys_are_split_gives_the_same(change, device):
    case = replace(LONG, **change)
    tensors = case.tensors(device=device)
    options = case.options(*tensors)
    whole = probe.probe(*tensors[:2], options, TILES, sample=(3, 1))
    split = probe.probe(*tensors[:2], options, TILES, sample=(3, 1), parts=4)
    assert torch.equal(split[-1], whole[-1])
    for name, actual, wanted in zip(NAMES, split[:4], whole):
        close(actual, wanted, 2e-6, name)


def test_large_scores_and_broken_rows_survive_a_split(device):
    case = replace(LONG, num_queries=40)
    q, k, *_ = case.tensors(device=device)
    q = q * 3000  # scores up to 1e4, where only differences of maxima are exact
    q[0, 0, 3, 1], k[1, 0, 50, 2] = torch.nan, torch.inf
    options = case.options(q, k, None, None, None)
    whole, split = (probe.probe(q, k, options, TILES, parts=parts) for parts in (1, 3))
    for name, actual, wanted in zip(NAMES, split[:4], whole):
        assert torch.equal(actual.isnan(), wanted.isnan()) and wanted.isnan().any()
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-5, equal_nan=True, msg=name)


def test_keys_are_split_where_rows_alone_leave_a_card_idle(monkeypatch, device):
    launched = []
    launch = probe.launch
    monkeypatch.setattr(
        probe, "launch", lambda kernel, *rest, **kw: launched.append(kernel) or launch(kernel, *rest, **kw)
    )

    def run(rows, keys, extended=False, **change):
        launched.clear()
        case = Case(1, 1, 1, rows, keys, **change)
        q, k, *_ = case.tensors(device=device)
        options = case.options(q, k, None, None, None)
        entropy = probe.probe(q, k, options, extended=extended)[1]
        close(entropy, reference.attention(q, k, None, options)[1].entropy, 2e-5, "entropy")
        return list(launched)

    assert run(8, 1100) == [probe._probe_kernel, probe._join_kernel]
    assert (
        run(8, 1000) == run(8, 1100, extended=True) == run(8, 1100, window_size=200) == [probe._probe_kernel]
    )
    assert probe._parts(programs=256, num_keys=8192) == 4
    assert probe._parts(programs=513, num_keys=8192) == 1


def _check_sample(case, dtype, device, period, phase):
    tensors = case.tensors(dtype, device)
    q, k = tensors[:2]
    options = case.options(*tensors)
    period = sampling.effective_period(period, case.num_queries)
    phase %= period
    *core, more, index = probe.probe(q, k, options, TILES, extended=True, sample=(period, phase))
    wanted_index = sampling.row_index(*q.shape[:3], period, phase, q.device)
    assert index.dtype == torch.int64 and torch.equal(index, wanted_index)
    wanted = reference.attention(q, k, None, options, extended=True, index=wanted_index)[1]
    for name, actual in zip(NAMES, (*core, *more), strict=True):
        close(actual, getattr(wanted, name), 2e-5, name)
    if not case.num_keys:
        return
    full = reference.attention(q, k, None, options, extended=True)[1]
    taken = index >= 0
    for name in NAMES:
        at_index = masks.take_rows(getattr(full, name), index)
        close(torch.where(taken, getattr(wanted, name), 0.0), torch.where(taken, at_index, 0.0), 2e-5, name)
        blank = {"lse": -torch.inf, "max_logit": -torch.inf, "min_logit": torch.inf}.get(name, 0.0)
        assert (getattr(wanted, name)[~taken] == blank).all(), name


@pytest.mark.parametrize(
    ("change", "period", "phase"),
    [
        pytest.param({}, 2, 0, marks=pytest.mark.slow),
        ({"is_causal": True, "num_keys": 290}, 3, 5),
        pytest.param({"window_size": 40}, 2, 0, marks=pytest.mark.slow),
        pytest.param({"window_size": 40, "is_causal": True, "num_keys": 300}, 3, 5, marks=pytest.mark.slow),
        pytest.param({"mask": "rows", "sinks": True}, 2, 0, marks=pytest.mark.slow),
        pytest.param({"mask": "heads"}, 3, 5, marks=pytest.mark.slow),
        ({"mask": "additive", "softcap": 2.0}, 2, 0),
        ({"num_queries": 20}, 3, 5),
        ({"num_keys": 0}, 2, 0),
        ({"num_queries": 0}, 3, 5),
    ],
    ids=str,
)
def test_a_sample_matches_the_reference(change, period, phase, device):
    _check_sample(replace(LONG, batch=1, **change), torch.float32, device, period, phase)


@pytest.mark.slow
@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    case=random_cases(), num_queries=st.integers(1, 300), period=st.integers(1, 5), phase=st.integers(0, 9)
)
def test_a_sample_matches_the_reference_anywhere(case, num_queries, period, phase):
    _check_sample(replace(case, num_queries=num_queries), torch.float32, DEVICE, period, phase)


@pytest.mark.slow
@pytest.mark.parametrize("period", [pytest.param(2, marks=pytest.mark.exhaustive), 16])
def test_a_period_of_samples_is_the_measurement_of_all_rows(period, device):
    case = replace(LONG, is_causal=True)
    q, k, *_ = case.tensors(device=device)
    options = case.options(q, k, None, None, None)
    period = sampling.effective_period(period, case.num_queries)
    expected = probe.probe(q, k, options, TILES)[:4]
    together = [torch.full_like(x, torch.nan) for x in expected]
    for phase in range(period):
        *core, _, index = probe.probe(q, k, options, TILES, sample=(period, phase))
        for b, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:2])).tolist():
            taken = index[b, h] >= 0
            for whole, part in zip(together, core):
                assert whole[b, h, index[b, h, taken]].isnan().all(), "a row came twice"
                whole[b, h, index[b, h, taken]] = part[b, h, taken]
    for name, whole, wanted in zip(NAMES, together, expected):
        torch.testing.assert_close(whole, wanted, rtol=1e-6, atol=1e-6, msg=name)


def test_nan_stays_in_its_row(device):
    q, k, *_ = LONG.tensors(device=device)
    q[1, 1, 70, 3] = torch.nan
    for sample in (None, (2, 0), (2, 1)):
        rows = attention_stats(q, k, extended=True, sample=sample)
        broken = torch.zeros(q.shape[:3], dtype=torch.bool, device=device)
        broken[1, 1, 70] = True
        if sample is not None:
            broken = masks.take_rows(broken, rows.row_index) & (rows.row_index >= 0)
        assert all(torch.equal(getattr(rows, name).isnan(), broken) for name in NAMES[:-1])
        assert not rows.visible_keys[rows.lse != -torch.inf].sub(LONG.num_keys).any()


@pytest.mark.parametrize("shift", [pytest.param(100.0, marks=pytest.mark.slow), 3000.0])
def test_spreads_do_not_depend_on_a_common_shift(shift, device):
    """One more coordinate moves all scores of a row by `shift`, to the score's rounding."""
    q, k, *_ = replace(LONG, num_queries=40).tensors(device=device)
    one = torch.ones(*q.shape[:3], 8, device=device)
    moved = torch.cat([q, one], -1), torch.cat([k, one[:, :1, :1].expand(*k.shape[:3], 8) * shift / 8], -1)
    *core, more, _ = _probe_extended(q, k)
    *moved_core, moved_more, _ = _probe_extended(*moved)
    rounding = 4 * torch.finfo(torch.float32).eps * shift
    for name, actual, wanted in zip(EXTENDED, moved_more, more, strict=True):
        close(actual, wanted + shift if name == "score_mean" else wanted, rounding, name)
    close(moved_core[1], core[1], rounding, "entropy")
    close(moved_core[0], core[0] + shift, rounding, "lse")


def _probe_extended(q, k):
    options = Case(scale=1.0).options(q, k, None, None, None)
    return probe.probe(q, k, options, TILES, extended=True)


def test_the_order_of_keys_does_not_matter_but_for_the_first(device):
    q, k, *_ = replace(LONG, num_queries=40).tensors(device=device)
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(k.shape[2] - 1)])
    *core, more, _ = _probe_extended(q, k)
    *permuted_core, permuted_more, _ = _probe_extended(q, k[:, :, order.to(device)])
    for name, actual, wanted in zip(NAMES, (*permuted_core, *permuted_more), (*core, *more)):
        close(actual, wanted, 5e-6, name)


def test_ties_hold_all_the_mass(device):
    """Two equal maxima far above the rest: collision 1/2, tie_mass 1, no spread under p."""
    k = torch.zeros(1, 1, 40, 16)
    k[:, :, 7], k[:, :, 30] = 4.0, 4.0
    rows = attention_stats(torch.ones(1, 1, 3, 16).to(device), k.to(device), scale=1.0, extended=True)
    for got, expected in ((rows.collision, 0.5), (rows.tie_mass, 1.0), (rows.logit_var, 0.0)):
        torch.testing.assert_close(got, torch.full_like(got, expected), rtol=1e-6, atol=1e-6)


def test_sampled_statistics_are_compact_and_have_no_gradient(device):
    q, k, *_ = LONG.tensors(device=device)
    rows = attention_stats(q.requires_grad_(), k, sample=(3, 7))
    assert rows.lse.shape == rows.row_index.shape == (2, 2, 128)
    assert rows.sink_mass is None and not rows.lse.requires_grad
    assert rows.detach().row_index is not None


def test_extended_attention_stays_differentiable(device):
    q, k, v, *_ = CASES["causal"].tensors(device=device)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    gradients = []
    for extended in (False, True):
        out, rows = attention(*leaves, is_causal=True, extended=extended)
        loss = out.square().sum() + rows.lse.sum() + rows.entropy.square().sum()
        gradients.append(torch.autograd.grad(loss, leaves))
        if extended:
            assert not any(getattr(rows, name).requires_grad for name in EXTENDED)
    for plain, actual in zip(*gradients):
        torch.testing.assert_close(actual, plain)


def test_a_sample_compiles_to_a_full_graph(device):
    q, k, *_ = LONG.tensors(device=device)

    def sampled(q, k):
        return _tuple(attention_stats(q, k, is_causal=True, extended=True, sample=(2, 1)))

    compiled = torch.compile(sampled, fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(compiled(q, k), sampled(q, k)):
        torch.testing.assert_close(actual, wanted)


def _tuple(rows):
    return tuple(getattr(rows, name) for name in (*NAMES, "row_index"))


@pytest.mark.parametrize("name", ["plain", "causal", "rows", "additive", "sinks"])
def test_measure_of_a_sample_agrees_with_the_extended_reference(name, device):
    change = {"causal": {"is_causal": True}, "sinks": {"sinks": True}, "plain": {}}.get(name, {"mask": name})
    case = replace(LONG, **change)
    q, k, _, mask, sinks = case.tensors(device=device)
    keywords = case.keywords(mask, sinks)
    rows = attention_stats(q, k, extended=True, sample=(3, 1), **keywords)
    options = case.options(q, k, None, mask, sinks)
    visible, sink_mass, *_ = measure(q, k, rows, options)
    close(sink_mass, rows.sink_mass, 1e-4, "sink_mass")
    assert torch.equal((visible <= 0).expand(rows.lse.shape), rows.lse == -torch.inf)
    every, *_ = measure(q, k, attention_stats(q, k, **keywords), options)
    at_index = masks.take_rows(every.expand(q.shape[:3]), rows.row_index)
    assert torch.equal(visible, torch.where(rows.row_index >= 0, at_index, -1))
