"""The check that the quick suite launches every kernel in every option, and what it reads launches by."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from interpreter import dtype, leaves
from kernel_options import KERNELS, missing


def launched():
    return {kernel: {"dtype": set(dtypes), "causal": {False, True}} for kernel, dtypes in KERNELS.items()}


def test_a_suite_that_launched_everything_misses_nothing():
    assert missing(launched()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda seen: seen.pop("dq_kernel"), "dq_kernel was not launched"),
        (
            lambda seen: seen["dq_kernel"]["causal"].remove(True),
            "dq_kernel was not launched with causal=True",
        ),
        (
            lambda seen: seen["fold_kernel"]["dtype"].remove("bfloat16"),
            "fold_kernel was not launched with dtype=bfloat16",
        ),
        (lambda seen: seen.update(new_kernel={}), "new_kernel is not in KERNELS"),
    ],
)
def test_what_was_left_out_is_named(change, said):
    seen = launched()
    change(seen)
    assert missing(seen) == [said]


class Strides(NamedTuple):
    ptr: torch.Tensor
    stride: int


@dataclass(frozen=True)
class Scores:
    is_causal: bool


@dataclass(frozen=True)
class Plan:
    scores: Scores
    extended: bool


def test_arguments_are_read_through_tuples_and_plans():
    x = torch.zeros(2, dtype=torch.float16)
    found = dict(leaves("call", Strides(x, 3))) | dict(leaves("PLAN", Plan(Scores(True), False)))
    assert dtype(found.pop("ptr")) == torch.float16
    assert found == {"stride": 3, "is_causal": True, "extended": False}
    assert list(leaves("rows", (1, None))) == [("rows", 1), ("rows", None)]
    assert dtype(1) is None
