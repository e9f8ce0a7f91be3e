"""Small calls against the fp64 reference: output, statistics and gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...engine.api import attention
from ...engine.call import check
from ...engine.card import current_device
from ...reference import attention as reference
from ...reference.options import Options

TESTED_HEAD_DIMS = (64, 128)
LENGTH = 200  # tokens: several tiles, none of them full at the end
# Relative to the fp64 result, by norm: the roundings of the softmax weights and of the output in that
# dtype, with room for the gradients' longer chain. Statistics are fp32 whatever the dtype.
OUTPUT_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
STATISTICS_TOLERANCE = 2e-5


@dataclass(frozen=True)
class Trial:
    """One self-test against the fp64 reference.

    out and gradients: relative errors, by norm. statistics: the largest absolute error, nats.
    """

    dtype: torch.dtype
    head_dim: int
    is_causal: bool
    out: float
    statistics: float
    gradients: float

    @property
    def passed(self) -> bool:
        allowed = OUTPUT_TOLERANCE[self.dtype]
        # Written so that NaN fails.
        return self.out <= allowed and self.gradients <= allowed and self.statistics <= STATISTICS_TOLERANCE

    def to_dict(self) -> dict[str, Any]:
        """JSON types. A number that is not finite is None."""
        errors = {name: getattr(self, name) for name in ("out", "statistics", "gradients")}
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "head_dim": self.head_dim,
            "is_causal": self.is_causal,
            **{name: error if math.isfinite(error) else None for name, error in errors.items()},
            "passed": self.passed,
        }


def self_test() -> Iterator[Trial]:
    """Forward, statistics and gradients of small random calls against the fp64 reference, one by one."""
    for dtype in OUTPUT_TOLERANCE:
        for head_dim in TESTED_HEAD_DIMS:
            for is_causal in (False, True):
                yield _trial(dtype, head_dim, is_causal)


def options_of(q: Tensor, is_causal: bool) -> Options:
    """The options of a plain call."""
    return check(
        q, q, q, attn_mask=None, is_causal=is_causal, scale=None, window_size=None, softcap=None, sinks=None
    )


def _trial(dtype: torch.dtype, head_dim: int, is_causal: bool) -> Trial:
    generator = torch.Generator().manual_seed(0)
    shape = (1, 2, LENGTH, head_dim)
    q, k, v, d_out = (torch.randn(shape, generator=generator).to(current_device(), dtype) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, rows = attention(*leaves, is_causal=is_causal)
    gradients = torch.autograd.grad(out, leaves, d_out)

    q, k, v = (x.detach().double() for x in leaves)
    options = options_of(q, is_causal)
    true_out, true_rows = reference.attention(q, k, v, options)
    assert true_out is not None
    true = reference.backward(
        q, k, v, options, true_out, true_rows.lse, true_rows.entropy, d_out.double(), None, None
    )
    names = ("lse", "entropy", "max_logit", "min_logit")
    return Trial(
        dtype,
        head_dim,
        is_causal,
        relative(out, true_out),
        max(float((getattr(rows, n).detach().double() - getattr(true_rows, n)).abs().max()) for n in names),
        max(relative(got, wanted) for got, wanted in zip(gradients, true[:3]) if wanted is not None),
    )


def relative(got: Tensor, true: Tensor) -> float:
    """The error of `got`, by norm, relative to the true numbers in fp64."""
    return float((got.detach().double() - true).norm() / true.norm())
