"""Forward and backward of our attention, with core statistics, beside every peer, on one GPU.

    python -m pytest bench/test_training.py --benchmark-json=bench/results/training_NAME.json
    python bench/report.py bench/results/training_NAME.json

Inputs are random bf16, B * N = 16k tokens (32k at N = 32k). Work: 4 * B * H * M * N * D floating-point operations in
the forward, and 2.5 times as many in the backward (five products instead of two); half of both under a causal mask.
Bytes: q, k, v and out once in the forward; these, their four gradients and lse in the backward; three times the
forward's in all. "ours, entropy" adds a cotangent of entropy, which only our own backward kernel supports.
`peak_bytes` is the most that one call allocates beyond its inputs and cotangents.
"""

import pytest
import torch
from peers import CORE, PEERS
from suite import Case, measure, pick
from timing import cuda_clock

if not torch.cuda.is_available():
    pytest.skip("without a GPU there is nothing to time", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("default")  # SDPA warns when it refuses a call, and Inductor often
ENTROPY = "ours, entropy"
# A probe has no output. A forward with fewer statistics has the same backward.
TRAINED = [name for name in PEERS if name != "ours, lse only" and not name.startswith("probe")]
# How many of a peer's results have a cotangent. Our second result is entropy.
COTANGENTS = {ENTROPY: 2}
LENGTHS_OF = {"flex": (8192,), ENTROPY: (8192,), "ours, extended": (8192,), "eager with weights": (2048,)}


def _wanted(case: Case, peer: str) -> bool:
    """Core peers run at every case; peers that take long to compile or to run, at one length."""
    if peer in CORE:
        return True
    chosen = case.heads == case.kv_heads and (case.is_causal or (peer == ENTROPY and case.head_dim <= 128))
    return chosen and case.length in LENGTHS_OF.get(peer, ())


@pytest.mark.benchmark(timer=cuda_clock, disable_gc=True)
@pytest.mark.parametrize((*Case._fields, "peer"), pick([*TRAINED, ENTROPY], _wanted))
def test_training(benchmark, head_dim, heads, kv_heads, length, is_causal, peer):
    case = Case(head_dim, heads, kv_heads, length, is_causal)
    inputs = case.inputs("cuda", requires_grad=True)
    attend = PEERS["ours" if peer == ENTROPY else peer]
    cotangents = []

    def step():
        outputs = attend(*inputs, is_causal)[: COTANGENTS.get(peer, 1)]
        if not cotangents:
            cotangents.extend(torch.randn_like(x) for x in outputs)
        return torch.autograd.grad(outputs, inputs, cotangents)

    benchmark.group = case.label
    benchmark.extra_info["flop"] = case.flop * 7 // 2
    benchmark.extra_info["bytes"] = case.bytes * 3
    measure(benchmark, step)
