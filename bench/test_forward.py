"""Forward time and peak memory of our attention with statistics, beside every peer, on one GPU.

    python -m pytest bench/test_forward.py --benchmark-json=bench/results/forward_NAME.json
    python bench/report.py bench/results/forward_NAME.json

Inputs are random bf16, B * N = 16k tokens (32k at N = 32k), for a model width of 2048. Work: 4 * B * H * M * N * D
floating-point operations (two products of 2 each), half of that under a causal mask. Bytes: q, k, v and out once
each, 8 * B * H * N * D in bf16 without grouped heads. That is N / 4 operations per byte under a causal mask. An H100
does about 300 operations in the time of a byte. So the kernels are near the balance at 1k, and bound by arithmetic
from 2k on. The four core statistics add 16 bytes per row to the 2 * D bytes of out.

A probe does half of the work (one product); a probe of 1/16 of the rows does 1/32. Their rates count that work.
`peak_bytes` is the most that one call allocates beyond its inputs, its results included.
"""

import pytest
import torch
from peers import CORE, PEERS, PERIOD
from suite import Case, measure, pick
from timing import cuda_clock

if not torch.cuda.is_available():
    pytest.skip("without a GPU there is nothing to time", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("default")  # SDPA warns when it refuses a call, and Inductor often
SHARE_OF_WORK = {"probe all": 1 / 2, "probe 1/16": 1 / 2 / PERIOD}


def _wanted(case: Case, peer: str) -> bool:
    """Core peers run at every case; peers that take long to compile or to run, at one or two lengths."""
    if peer in CORE:
        return True
    chosen = case.heads == case.kv_heads and (case.is_causal or case.head_dim == 128)
    return chosen and case.length in ((8192,) if peer.startswith("flex") else (2048, 8192))


@pytest.mark.benchmark(timer=cuda_clock, disable_gc=True)
@pytest.mark.parametrize((*Case._fields, "peer"), pick(PEERS, _wanted))
def test_forward(benchmark, head_dim, heads, kv_heads, length, is_causal, peer):
    case = Case(head_dim, heads, kv_heads, length, is_causal)
    q, k, v = case.inputs("cuda")
    benchmark.group = case.label
    benchmark.extra_info["flop"] = round(case.flop * SHARE_OF_WORK.get(peer, 1))
    benchmark.extra_info["bytes"] = case.bytes
    with torch.no_grad():
        measure(benchmark, lambda: PEERS[peer](q, k, v, is_causal))
