"""Launches that ask the device what is wanted of them, against the reference that the host asks."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from cases import Case

from hnf_attention.engine import engines, fold, graphed
from hnf_attention.engine.graphed import EVALUATION, EXTREMES, STATISTICS, GraphedCall
from hnf_attention.reference import extremes as reference
from hnf_attention.reference import measured
from hnf_attention.reference.context import hidden_keys
from hnf_attention.statistics.rows import RowStats

pytest.importorskip("triton", reason="Triton kernels need Linux")
from hnf_attention.kernels.measure import extremes as kernel

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


@pytest.fixture
def by_kernels(monkeypatch):
    """Launch the kernels, in Triton's interpreter where there is no card."""
    if not ON_GPU:
        monkeypatch.setattr(engines, "kernels_cover", lambda query, value: True)
        monkeypatch.setattr(engines, "on_device", lambda query: nullcontext())


def tensors(case, dtype=torch.float32):
    q, k, v, mask, _ = case.tensors(dtype, DEVICE)
    out = torch.randn(*q.shape[:3], v.shape[3], device=DEVICE).to(dtype)
    if mask is not None and case.num_queries == case.num_keys:  # the last keys are padding
        mask[..., -case.num_keys // 3 :] = False if mask.dtype == torch.bool else -torch.inf
    return (q, k, v, out), case.options(q, k, v, mask, None)


def fresh(heads, control):
    return graphed.new_state(
        heads,
        torch.tensor([control], device=DEVICE),
        reference.new_result(heads, torch.device(DEVICE)),
    )


def found(call, given, mask, *controls):
    """What is folded under grad and not, and the extremes, after runs under these controls."""
    state = fresh(given[0].shape[1], 0)
    for control in controls:
        state.control.fill_(control)
        call.run(state, given, mask)
    folds = [fold.collect([part]).cpu().numpy() for part in state.accumulator]
    return *folds, reference.decoded(state.result.cpu().numpy())


def expected(given, options, phase, *controls, rows=64):
    """The same, in fp64 and plain PyTorch."""
    state = fresh(given[0].shape[1], 0)
    state = state._replace(accumulator=state.accumulator[:, :1].cpu().clone())
    mask, left_out = options.attn_mask, None
    if mask is not None and given[0].shape[2] == given[1].shape[2]:
        left_out = hidden_keys(options, given[0].shape[0], *mask.shape[2:])
    for control in controls:
        number = control & graphed.NUMBER
        wide = [x.double() if x.is_floating_point() else x for x in given]
        if control & EXTREMES:
            reference.raise_result(state.result, *given, options, left_out, number, number + phase, rows)
        if control & STATISTICS:
            one = GraphedCall(tuple(x.cpu() for x in wide), options, phase)
            cpu = graphed.State(state.accumulator, state.result.cpu(), torch.tensor([control & ~EXTREMES]))
            one._by_kernels = False
            one.run(cpu, tuple(x.cpu() for x in wide), None if mask is None else mask.cpu())
    folds = [fold.collect([part]).numpy() for part in state.accumulator]
    return *folds, reference.decoded(state.result.cpu().numpy())


CASES = [
    Case(1, 1, 2, 9, 12, 8, 8),
    pytest.param(Case(2, 2, 2, 70, 40, 16, 24), marks=pytest.mark.slow),
    pytest.param(Case(1, 3, 1, 130, 130, 16, 16, is_causal=True), marks=pytest.mark.slow),
    pytest.param(Case(1, 1, 1, 5, 9, 8, 8), marks=pytest.mark.slow),
    pytest.param(Case(2, 1, 2, 70, 70, 16, 16, mask="bool"), marks=pytest.mark.slow),
    pytest.param(Case(2, 1, 2, 40, 40, 16, 16, mask="additive"), marks=pytest.mark.slow),
    pytest.param(Case(2, 1, 2, 21, 40, 16, 16, mask="heads"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "bad",
    [
        None,
        pytest.param("value", marks=(pytest.mark.slow, pytest.mark.exhaustive)),
        pytest.param("out", marks=(pytest.mark.slow, pytest.mark.exhaustive)),
    ],
)
def test_what_the_control_asks_for_is_measured(by_kernels, case, bad):
    given, options = tensors(case)
    if bad:
        given[2 if bad == "value" else 3][0, 0, 3, 1] = torch.nan
        given[3][0, 0, 3, 1] = torch.nan
    call = GraphedCall(given, options, 2)
    controls = (
        0,
        1 | EXTREMES,
        2 | STATISTICS,
        3 | EXTREMES | STATISTICS,
        4 | STATISTICS | EVALUATION,
        5,
    )
    rows = kernel.block_rows(given[0].shape[3], given[0].dtype, options)
    got = found(call, given, options.attn_mask, *controls)
    want = expected(given, options, 2, *controls, rows=rows)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)
    assert np.isfinite(got[2][0]).any() and (got[1] != got[0]).any()


@pytest.mark.parametrize("wanted", [EXTREMES, STATISTICS])
def test_what_it_does_not_ask_for_is_left_alone(by_kernels, wanted):
    given, options = tensors(CASES[0])
    call = GraphedCall(given, options, 0)
    under_grad, other, extremes = found(call, given, None, 7 | wanted)
    nothing = found(call, given, None, 7)
    np.testing.assert_array_equal(other, nothing[1])
    assert (extremes == nothing[2]).all() == (wanted == STATISTICS)
    assert (under_grad == nothing[0]).all() == (wanted == EXTREMES)


@pytest.mark.parametrize(
    "case, dtype, has_out",
    [
        (Case(1, 1, 2, 6, 7, 8, 8, is_causal=True, window_size=3, softcap=5.0), torch.float16, True),
        (Case(1, 1, 1, 6, 6, 8, 8, mask="bool"), torch.float32, False),
        (Case(1, 1, 1, 5, 6, 8, 8, mask="additive"), torch.float32, True),
        (Case(1, 1, 1, 7, 7, 8, 8, seqlens=(0, 3, 7)), torch.float32, True),
    ],
    ids=["causal, window, soft-cap", "padding", "bias", "pack"],
)
def test_extremes_of_every_kind_of_call(by_kernels, case, dtype, has_out):
    given, options = tensors(case, dtype)
    given = given[:3] + ((given[3] if has_out else None),)
    given[1][0, 0, 1, 2] = torch.nan
    state = fresh(given[0].shape[1], 3 | EXTREMES)
    GraphedCall(given, options, 2).run(state, given, options.attn_mask, statistics=False)
    want = reference.new_result(given[0].shape[1], torch.device(DEVICE))
    left_out = None
    if options.attn_mask is not None and case.num_queries == case.num_keys:
        left_out = hidden_keys(options, 1, case.num_queries, case.num_keys)
    rows = kernel.block_rows(given[0].shape[3], dtype, options)
    reference.raise_result(want, *given, options, left_out, 3, 5, rows)
    got, wanted = (reference.decoded(x.cpu().numpy()) for x in (state.result, want))
    np.testing.assert_allclose(got, wanted, rtol=1e-3 if dtype == torch.float16 else 1e-5)
    assert (got != reference.decoded(reference.new_result(1, torch.device("cpu")).numpy())).any()


def test_a_tie_goes_to_the_first_key_and_few_rows_share_none(by_kernels):
    beside = engines.kernel("measure.beside").beside
    weights = torch.zeros(1, 3, 1500, device=DEVICE)
    weights[0, 0, [1400, 300, 1324]] = 2.0
    weights[0, 1, 7] = torch.nan
    value = torch.zeros(1, 3, 1500, 8, device=DEVICE)
    value[0, 2, 1499, 7] = -torch.inf
    shared, sizes, outs = beside(weights, value, None, 9, 8)
    assert shared.tolist() == [[300, -1, -1]] and outs is None
    assert sizes.isnan().nonzero().tolist() == [[0, 2, 1499]] and sizes.nansum() == 0
    assert beside(weights, value, None, 7, 8)[0].tolist() == [[-1, -1, -1]]


def test_rows_asked_are_those_of_the_specification():
    rows_asked = engines.kernel("measure.rows_asked").rows_asked
    torch.manual_seed(0)
    lse = torch.randn(3, 2, 300, device=DEVICE)
    left_out = torch.rand(3, 300, device=DEVICE) < 0.4
    left_out[1] = True
    left_out[1, [3, 5, 9, 77, 200, 201, 202]] = False  # seven rows are too few
    index, chosen = rows_asked(lse, left_out, 32, 8)
    query = torch.empty(3, 2, 300, 1, device=DEVICE)
    rows = RowStats(lse, lse, lse, lse)
    places, expected = measured.rows_asked(query, rows, left_out)
    assert torch.equal(index, places) and (index[1] == -1).all()
    assert torch.equal(chosen, torch.where(places >= 0, expected, 0.0))
