"""`hnf-attention doctor`: what this machine is, which engine each head dimension takes and why, and a self-test."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor

from ..engine import engines
from ..engine.api import attention
from ..engine.call import Call, check
from ..engine.card import card_of, current_device
from ..reference import attention as reference
from ..reference.options import Options
from ..versions import versions
from .exit_codes import FOUND, HEALTHY
from .output import console

HEAD_DIMS = (16, 32, 64, 80, 96, 112, 128, 192, 256)
TESTED_HEAD_DIMS = (64, 128)
LENGTH = 200  # of the self-test: several tiles, none of them full at the end
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


def software() -> dict[str, str | None]:
    """Versions of Python, of the packages this project computes with, and of cuDNN."""
    found = versions("hnf-attention", "torch", "triton", "numpy", "transformers")
    found["torch"] = str(torch.__version__)  # names its build, which the package's version leaves out
    found["cuda"] = torch.version.cuda
    found["cudnn"] = str(torch.backends.cudnn.version()) if torch.cuda.is_available() else None
    return found


def card() -> str:
    """The device's name, compute capability and memory, or that there is none."""
    found = card_of(current_device())
    if found.vendor is None:
        return "no CUDA card: attention runs in PyTorch, in chunks"
    return f"{found.name}, compute capability {found.compute}, {found.memory / 2**30:.0f} GiB"


def paths() -> dict[str, list[tuple[torch.dtype, int]]]:
    """Which (dtype, head dimension) takes which "forward / backward" path, for plain causal training calls."""
    found: dict[str, list[tuple[torch.dtype, int]]] = {}
    for dtype, head_dim, call in _plain_calls():
        engine = [engines.choose(each, call).name for each in (engines.FORWARD, engines.BACKWARD)]
        found.setdefault(" / ".join(engine), []).append((dtype, head_dim))
    return found


def reasons() -> dict[str, str]:
    """Why a faster engine was not taken, "engine: reason", and in which of the calls of `paths`."""
    found: dict[str, dict[tuple[torch.dtype, int], None]] = {}
    for dtype, head_dim, call in _plain_calls():
        for name, reason in engines.explain(engines.FORWARD, call) + engines.explain(engines.BACKWARD, call):
            if reason is not None:
                found.setdefault(f"{name}: {reason}", {})[dtype, head_dim] = None
    all_calls = len(OUTPUT_TOLERANCE) * len(HEAD_DIMS)
    return {
        text: "all" if len(calls) == all_calls else by_dtype(list(calls)) for text, calls in found.items()
    }


def by_dtype(taken: list[tuple[torch.dtype, int]]) -> str:
    """The head dimensions of each dtype, a dtype a line."""
    dims: dict[torch.dtype, list[str]] = {}
    for dtype, head_dim in taken:
        dims.setdefault(dtype, []).append(str(head_dim))
    return "\n".join(
        f"{str(dtype).removeprefix('torch.')}: {', '.join(each)}" for dtype, each in dims.items()
    )


def _plain_calls() -> Iterator[tuple[torch.dtype, int, Call]]:
    for dtype in OUTPUT_TOLERANCE:
        for head_dim in HEAD_DIMS:
            q = torch.empty(1, 1, 256, head_dim, dtype=dtype, device=current_device())
            yield dtype, head_dim, Call(q, q, q, _options(q, True))


def self_test() -> Iterator[Trial]:
    """Forward, statistics and gradients of small random calls against the fp64 reference, one by one."""
    for dtype in OUTPUT_TOLERANCE:
        for head_dim in TESTED_HEAD_DIMS:
            for is_causal in (False, True):
                yield _trial(dtype, head_dim, is_causal)


def _options(q: Tensor, is_causal: bool) -> Options:
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
    options = _options(q, is_causal)
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
        _relative(out, true_out),
        max(float((getattr(rows, n).detach().double() - getattr(true_rows, n)).abs().max()) for n in names),
        max(_relative(got, wanted) for got, wanted in zip(gradients, true[:3]) if wanted is not None),
    )


def _relative(got: Tensor, true: Tensor) -> float:
    return float((got.detach().double() - true).norm() / true.norm())


def run(options: argparse.Namespace) -> int:
    """Print everything; the exit code says whether the self-test passed."""
    screen = console(sys.stdout)
    for name, version in software().items():
        screen.print(f"{name} {version or 'not installed'}", highlight=False)
    screen.print(card(), highlight=False)
    table = Table("forward / backward", "head dimensions", title="Paths of a plain causal training step")
    for path, taken in paths().items():
        table.add_row(path, by_dtype(taken))
    screen.print(table)
    table = Table("engine: reason", "head dimensions", title="Why no faster engine is taken")
    for reason, refused in reasons().items():
        table.add_row(reason, refused)
    screen.print(table)
    columns = ("dtype", "head dim", "causal", "output", "statistics", "gradients", "")
    table = Table(*columns, title=f"Errors against double precision, {LENGTH} tokens")
    trials = list(self_test())
    for trial in trials:
        numbers = (f"{x:.1e}" for x in (trial.out, trial.statistics, trial.gradients))
        name, causal = str(trial.dtype).removeprefix("torch."), "yes" if trial.is_causal else "no"
        table.add_row(name, str(trial.head_dim), causal, *numbers, "ok" if trial.passed else "WRONG")
    screen.print(table)
    failed = sum(not trial.passed for trial in trials)
    screen.print(f"{failed} of {len(trials)} self-tests failed" if failed else "self-test passed")
    return FOUND if failed else HEALTHY
