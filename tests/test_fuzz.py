"""The fuzzer's slices, and that it would find what it looks for."""

import pytest
import torch
from fuzz_cases import draw_case
from fuzz_run import Run, computed, judge, sweep
from poison import GUARD, guarded, poison_gaps, poisoned_memory

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning"),  # NumPy's, of the interpreter
]
KERNELS, REFERENCE = Run(engine="kernels", largest=33), Run()


def check(numbers, run):
    result = sweep(numbers, run)
    assert result["ran"] == len(numbers)
    assert not result["failed"], "\n".join(
        "\n    ".join((x["case"], *x["faults"], x["replay"])) for x in result["failed"][:5]
    )


def test_fuzzed_calls_of_the_reference():
    check(range(20), REFERENCE)


def test_fuzzed_calls_of_the_kernels():
    check(range(100, 102), KERNELS)


@pytest.mark.slow
def test_more_fuzzed_calls():
    check(range(1000, 1150), REFERENCE)
    check(range(2000, 2012), KERNELS)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 20_000, 2000))
def test_twenty_thousand_fuzzed_calls(first):
    check(range(first, first + 2000), REFERENCE)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("first", range(4))
def test_fuzzed_calls_of_a_card(first):
    check(range(first, 4000, 8), Run("cuda", "kernels", kinds=8))


def test_a_number_makes_the_same_case_again():
    one, two = draw_case(7), draw_case(7)
    assert str(one) == str(two)
    assert all(torch.equal(getattr(one, x), getattr(two, x)) for x in ("query", "key", "value", "d_out"))


def test_every_kind_of_a_card_has_cases_of_its_own():
    kinds = {str(draw_case(number, kinds=4).problem) for number in range(0, 40, 4)}
    assert len(kinds) == 1 and len({str(draw_case(number, kinds=4)) for number in range(0, 40, 4)}) == 10


@pytest.mark.parametrize("name", ["out", "lse", "entropy", "max_logit", "d_query", "d_key", "d_value"])
def test_a_number_that_is_wrong_by_a_thousandth_is_found(name):
    """In fp32, where the scores are of a usual size."""
    for number in range(400):
        case = draw_case(number, dtypes=[torch.float32])
        problem = case.problem
        if case.scores == "normal" and "out" in problem.cotangents and problem.entry == "attention":
            found = computed(case, "cpu")
            if name in found and bool((found[name].isfinite() & (found[name].abs() > 0.1)).any()):
                break
    assert not judge(case, found, False).faults
    flat = found[name].flatten()
    place = int(torch.where(flat.isfinite(), flat.abs(), 0.0).argmax())
    flat[place] *= 1.001
    faults = judge(case, found | {name: flat.view(found[name].shape)}, False).faults
    assert len(faults) == 1 and faults[0].startswith(f"{name}: 1 of")


def test_memory_that_nobody_wrote_shows_and_so_does_what_was_written_beside_it():
    with poisoned_memory() as made:
        for x in (torch.empty(3, 4), torch.ones(2).new_empty(2, 3), torch.empty_like(torch.ones(5))):
            assert x.isnan().all() and x.is_contiguous()
        strided = torch.empty_strided((2, 3), (1, 2), dtype=torch.float16, device="cpu")
        assert strided.isnan().all() and strided.stride() == (1, 2)
        assert (torch.empty((4,), dtype=torch.int32) == -0x5A5A5A5B).all()
        assert made.overrun() == []
        strided.fill_(0.0)
        assert made.overrun() == []
        strided.as_strided((7,), (1,)).fill_(1.0)
        assert made.overrun() == ["memory beside 6 numbers of torch.float16 was overwritten"]
    assert torch.empty(1).untyped_storage().nbytes() == 4


def test_gaps_of_a_tensor_hold_nan_and_its_numbers_stay():
    x, whole = guarded((2, 6), torch.float32, "cpu")
    x.copy_(torch.arange(12.0).view(2, 6))
    rows = x[:, 1:5:2]
    poison_gaps(rows)
    assert rows.tolist() == [[1.0, 3.0], [7.0, 9.0]]
    assert int(whole.isfinite().sum()) == 4 and len(whole) == 12 + 2 * GUARD
