"""What a kernel is compiled for: one frozen object in place of a parameter for every choice.

A kernel takes its plan as the constant PLAN. Two plans with the same numbers are equal, and Triton compiles a kernel
once for each plan, each set of dtypes, and each class of integers (`launch.classes`).
"""

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Options(Protocol):
    """What changes the scores of a call, checked by the caller."""

    attn_mask: torch.Tensor | None  # 4-D, boolean or additive
    is_causal: bool
    scale: float
    window_size: int | None
    softcap: float | None
    sinks: torch.Tensor | None
    seqlens: torch.Tensor | None


class Plan:
    """The base of all plans: frozen dataclasses of numbers, and of tuples of numbers."""

    def __repr__(self) -> str:
        """Every number, as part of an identifier: Triton names functions, and keeps kernels on disk, by it."""
        return "_".join([type(self).__name__, *_words(vars(self).values())])


def _words(numbers: Iterable[Any]) -> Iterator[str]:
    for number in numbers:
        if isinstance(number, tuple):
            yield from _words(number)
        else:
            yield str(int(number) if isinstance(number, bool) else number).replace(".", "p").replace("-", "m")


@dataclass(frozen=True, repr=False)
class ScorePlan(Plan):
    """Which keys a query sees, and what is done to q.k."""

    is_causal: bool
    is_windowed: bool
    is_packed: bool
    has_softcap: bool
    has_mask: bool
    has_bias: bool  # the mask is additive

    @property
    def hides_both_ends(self) -> bool:
        """Whether the first keys that a block of queries sees are partly hidden, and not just the last ones."""
        return self.is_windowed or self.is_packed


_score_plan = functools.cache(ScorePlan)


def score_plan(options: Options) -> ScorePlan:
    mask = options.attn_mask
    return _score_plan(
        options.is_causal,
        options.window_size is not None,
        options.seqlens is not None,
        options.softcap is not None,
        mask is not None,
        mask is not None and mask.dtype != torch.bool,
    )


@functools.cache
def unit_exponent(scale: float) -> int:
    """The exponent of the largest power of two <= scale, for `softmax.units_of`: a constant takes no register."""
    return min(max(math.frexp(scale)[1] - 1, -90), 60)  # so that the limit is a number of fp32, too


def is_natural(scores: ScorePlan, scale: float) -> bool:
    """Whether scores are scaled before the softmax sees them.

    Otherwise the softmax scales its exponents, which saves one product for each score. That needs a positive scale
    (the maximum stays the maximum), and nothing that is added or capped in between.
    """
    return scale <= 0 or scores.has_softcap or scores.has_bias
