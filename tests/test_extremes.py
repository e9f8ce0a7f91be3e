"""The extremes kernel against its specification, and the specification against plain scores."""

import numpy as np
import pytest
import torch
from cases import Case, cases_with, random_cases
from hypothesis import given, settings

from hnf_attention.engine import extremes as engine
from hnf_attention.reference import extremes as specification
from hnf_attention.reference.attention import attention

pytest.importorskip("triton", reason="Triton kernels need Linux")
from hnf_attention.kernels.measure import extremes as kernel

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
FIELD = {name: place for place, name in enumerate(specification.FIELDS)}


def tensors(case, dtype=torch.float32):
    q, k, v, mask, sinks = case.tensors(dtype, DEVICE)
    options = case.options(q, k, v, mask, sinks)
    out = torch.randn(*q.shape[:3], v.shape[3], device=DEVICE).to(dtype)
    return q, k, v, out, options


def by_kernel(q, k, v, out, options, left_out=None, number=5, phase=0, calls=1):
    """The results of equal calls in one launch, decoded."""
    results = [specification.new_result(q.shape[1], q.device) for _ in range(calls)]
    tensors = [kernel.Tensors(q, k, v, out)] * calls
    kernel.Launch(tensors, results, options, left_out).run(tensors, number, phase)
    return [specification.decoded(x.cpu().numpy()) for x in results]


def by_reference(q, k, v, out, options, left_out=None, number=5, phase=0):
    result = specification.new_result(q.shape[1], q.device)
    rows = kernel.block_rows(q.shape[3], q.dtype, options)
    specification.raise_result(result, q, k, v, out, options, left_out, number, phase, rows)
    return specification.decoded(result.cpu().numpy())


def same(got, expected):
    np.testing.assert_allclose(got[:2], expected[:2], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(got[2:], expected[2:])


def check(case, dtype=torch.float32, **options):
    given = tensors(case, dtype)
    for place, got in enumerate(by_kernel(*given, **options, calls=2)):
        same(got, by_reference(*given, **options | {"phase": options.get("phase", 0) + place}))


@pytest.mark.parametrize("case, dtype", cases_with([torch.float32, torch.float16]))
def test_kernel_matches_the_specification(case, dtype):
    check(case, dtype)


@pytest.mark.slow
@given(random_cases())
@settings(max_examples=8 if not ON_GPU else 200, deadline=None)
def test_random_calls(case):
    check(case, phase=case.seed % 7)


@pytest.mark.parametrize("mask", [None, "bool"])
def test_blocks_come_in_turn_and_cover_every_row(mask):
    case = Case(1, 1, 2, 150, 90, mask=mask)
    q, k, v, out, options = tensors(case)
    whole = attention(q, k, None, options)[1].max_logit.amax((0, 2)).cpu().numpy()
    rows = kernel.block_rows(16, q.dtype, options)
    blocks = -(-150 // rows)
    each = [by_kernel(q, k, v, out, options, phase=phase)[0][0] for phase in range(blocks)]
    assert all((found <= whole + 1e-4).all() for found in each)
    np.testing.assert_allclose(np.max(each, 0), whole, rtol=1e-5)
    taken = torch.stack([specification.row_index(1, 2, 150, p, q.device, rows) for p in range(blocks)])
    for head in range(2):
        found = taken[:, 0, head][taken[:, 0, head] >= 0]
        assert sorted(found.tolist()) == list(range(150))


def test_rows_that_are_left_out_do_not_count():
    q, k, v, out, options = tensors(Case(2, 2, 1, 40, 40))
    q[:, :, 30:] *= 100
    left_out = torch.zeros(2, 40, dtype=torch.bool, device=DEVICE)
    left_out[:, 30:] = True
    same(by_kernel(q, k, v, out, options, left_out)[0], by_reference(q, k, v, out, options, left_out))
    (without,), (with_all,) = by_kernel(q, k, v, out, options, left_out), by_kernel(q, k, v, out, options)
    assert (without[0] < with_all[0] / 4).all()
    (nothing,) = by_kernel(q, k, v, out, options, torch.ones_like(left_out))
    assert np.isneginf(nothing[:2]).all()


@pytest.mark.parametrize(
    ("place", "bad"),
    [
        pytest.param(place, bad, marks=() if (first + second) % 3 == 0 else pytest.mark.slow)
        for first, place in enumerate(("query", "key", "value", "out"))
        for second, bad in enumerate((torch.nan, torch.inf, -torch.inf))
    ],
)
def test_nan_and_inf_are_found_where_they_are(place, bad):
    q, k, v, out, options = tensors(Case(2, 2, 2, 70, 40, 8, 24))
    given = {"query": q, "key": k, "value": v, "out": out}
    index = (1, 1, 37, 3)
    given[place][index] = bad
    out[1, 3 if place in ("key", "value") else 1, 69] = torch.nan  # what it would have done
    (got,) = by_kernel(q, k, v, out, options, number=7)
    head = 3 if place in ("key", "value") else 1
    expected = np.full((6, 4), -np.inf)
    expected[FIELD["first_out"], head] = -7
    if place != "out" and place != "query":
        expected[FIELD[f"first_{place}"], head] = -7
    if place == "query":  # row 69 is of the same chunk
        expected[FIELD["first_query"], 1] = -7
    if place == "out":
        expected[FIELD["first_out"], 1] = -7
    np.testing.assert_array_equal(got[2:], expected[2:])


def test_inputs_are_checked_themselves_where_the_output_is_not_known():
    q, k, v, _, options = tensors(Case(1, 1, 2, 300, 40))
    q[0, 1, 299, 2], v[0, 0, 39, 1] = torch.nan, torch.inf
    (got,) = by_kernel(q, k, v, None, options, number=9)
    same(got, by_reference(q, k, v, None, options, number=9))
    assert got[FIELD["first_query"]].tolist() == [-np.inf, -9]
    assert got[FIELD["first_value"]].tolist() == [-9, -9]
    assert np.isneginf(got[[FIELD["first_key"], FIELD["first_out"]]]).all()


def test_results_keep_the_first_forward_and_the_largest_score():
    q, k, v, out, options = tensors(Case(1, 2, 1, 20, 20))
    result = specification.new_result(2, q.device)
    bad = out.clone()
    bad[0, 0, 3] = torch.nan
    for number, (scale, mine) in enumerate([(1, out), (3, bad), (2, bad)], 1):
        given = [kernel.Tensors(q * scale, k, v, mine)]
        kernel.Launch(given, [result], options, None).run(given, number, 0)
    found = specification.decoded(result.cpu().numpy())
    assert found[FIELD["first_out"]].tolist() == [-2, -np.inf]
    np.testing.assert_allclose(found[0], by_kernel(q * 3, k, v, out, options)[0][0], rtol=1e-6)


def test_order_of_scores():
    numbers = torch.tensor([-torch.inf, -3e38, -1.5, -1e-30, 0.0, 1e-30, 2.0, 3e38, torch.inf])
    codes = specification.ordered(numbers)
    assert (codes.diff() > 0).all() and codes[0] > specification.NONE
    back = specification.decoded(torch.stack([codes, codes, *codes.new_zeros(4, 9)]).numpy())[0]
    np.testing.assert_array_equal(back, numbers.double().numpy())


def test_layouts_share_a_launch_and_empty_calls_are_left_out():
    cases = [Case(2, 2, 1, 24, 24), Case(2, 2, 1, 24, 24, transposed=True), Case(2, 2, 1, 24, 17), Case(0)]
    calls = []
    for case in cases:
        q, k, v, out, options = tensors(case)
        calls.append(
            engine.Call((q, k, v, out), options, None, specification.new_result(q.shape[1], q.device))
        )
    engine.Prepared(calls).run([call.tensors for call in calls], 3, 1)
    assert (calls[3].result == specification.NONE).all()
    for (q, k, _, _), options, _, result in calls[:3]:
        assert (result[:2] > specification.NONE).all() and (result[2:] == specification.NONE).all()
        largest = (q.float() @ k.float().mT * options.scale).amax((0, 2, 3))
        found = specification.decoded(result.cpu().numpy())[0]
        np.testing.assert_allclose(found, largest.cpu().numpy(), rtol=1e-5)


def test_what_is_prepared_takes_the_tensors_of_another_forward():
    (q, k, v, out, options), result = tensors(Case(2, 2, 1, 24, 24)), specification.new_result(2, DEVICE)
    prepared = engine.Prepared([engine.Call((q, k, v, out), options, None, result)])
    prepared.run([(q, k, v, out)], 1, 0)
    before = specification.decoded(result.cpu().numpy())
    broken = out.clone()
    broken[1, 0, 3, 3] = torch.inf
    prepared.run([(2 * q, k.clone(), v.clone(), broken)], 2, 0)
    after = specification.decoded(result.cpu().numpy())
    np.testing.assert_allclose(after[:2], 2 * before[:2], rtol=1e-6)
    assert after[FIELD["first_out"]].tolist() == [-2, -np.inf]
