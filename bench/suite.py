"""What the forward and the training suite share: cases, inputs, and how a case is timed."""

from typing import NamedTuple

import pytest
import torch
from peers import Unavailable
from timing import spent

TOKENS = 16384  # B * N, unless one sequence is longer
HEADS = {64: 32, 128: 16, 256: 8}  # by head dimension: a model width of 2048
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
ROUND = 20e-3  # seconds of one round; calls of up to 2 ms make rounds of ten
# Errors of SDPA and of Inductor that mean: this backend, or FlexAttention, does not support the call.
REFUSALS = ("No available kernel", "No valid triton configs", "out of resource")


class Case(NamedTuple):
    head_dim: int
    heads: int
    kv_heads: int
    length: int
    is_causal: bool

    @property
    def label(self) -> str:
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}:{self.kv_heads}"
        kind = "causal" if self.is_causal else "full"
        return f"D={self.head_dim} H={heads} N={self.length} {kind}"

    @property
    def batch(self) -> int:
        return max(1, TOKENS // self.length)

    @property
    def flop(self) -> int:
        """Of the forward: two products of 2 * B * H * M * N * D operations each, half under a causal mask."""
        pairs = self.length**2 // (2 if self.is_causal else 1)
        return 4 * self.batch * self.heads * pairs * self.head_dim

    @property
    def bytes(self) -> int:
        """q, k, v and out once each, in half precision."""
        return 2 * 2 * self.batch * (self.heads + self.kv_heads) * self.length * self.head_dim

    def inputs(self, device: str, requires_grad: bool = False) -> list[torch.Tensor]:
        torch.manual_seed(0)
        return [
            torch.randn(
                (self.batch, heads, self.length, self.head_dim),
                device=device,
                dtype=torch.bfloat16,
                requires_grad=requires_grad,
            )
            for heads in (self.heads, self.kv_heads, self.kv_heads)
        ]


CASES = [
    Case(head_dim, heads, heads, length, is_causal)
    for head_dim, heads in HEADS.items()
    for length in LENGTHS
    for is_causal in (True, False)
] + [  # four query heads a key head
    Case(head_dim, HEADS[head_dim], HEADS[head_dim] // 4, length, True)
    for head_dim in (64, 128)
    for length in (2048, 8192)
]


def pick(names, wanted) -> list:
    """Parameters of a test: every case with every peer for which `wanted(case, peer)` is true, case by case."""
    return [
        pytest.param(*case, name, id=f"{case.label}-{name}")
        for case in CASES
        for name in names
        if wanted(case, name)
    ]


def measure(benchmark, run) -> None:
    """Time `run` on the device's clock. A call that a peer does not support is skipped, with the reason.

    A round queues several calls, so that the host launches one while the device computes another.
    """
    try:
        run()  # compiles
    except Unavailable as reason:
        pytest.skip(str(reason))
    except RuntimeError as reason:
        refusal = next((text for text in REFUSALS if text in str(reason)), None)
        if refusal is None:
            raise
        pytest.skip(f"this peer does not support this call: {refusal}")
    one = spent(run)
    benchmark.extra_info["peak_bytes"] = one.peak - one.before
    del one  # it holds the result
    seconds = spent(run).device
    iterations = min(10, max(1, round(ROUND / seconds)))
    long = seconds > ROUND / 2
    benchmark.pedantic(run, rounds=7 if long else 15, iterations=iterations, warmup_rounds=1 if long else 3)
