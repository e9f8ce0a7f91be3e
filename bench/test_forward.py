"""Forward time and peak memory of our attention with statistics beside every peer, on one GPU.

    python -m pytest bench/test_forward.py --benchmark-json=bench/results/forward_NAME.json
    python bench/report.py bench/results/forward_NAME.json

Inputs are random bf16, B * N = 16k tokens (32k at N = 32k), a model width of 2048. Work: 4 * B * H * M *
N * D floating-point operations (two products of 2 each), half of that under a causal mask. Bytes: q, k, v
and out once each, 8 * B * H * N * D in bf16 without grouped heads. That is N / 4 operations a byte under a
causal mask: at 1k near what an H100 does in the time of a byte (about 300), from 2k on far above it, so all
kernels here are bound by arithmetic. The four core statistics add 16 bytes a row to the 2 * D of out.

A probe does half of the work (one product), 1/16 of the rows 1/32 of it; their rates count what they do.
`peak_bytes` is the most that one call allocates beyond its inputs, its results included.
"""

import pytest
import torch
from peers import CORE, PEERS, PERIOD
from suite import Case, measure, pick
from timing import cuda_clock

if not torch.cuda.is_available():
    pytest.skip("without a GPU there is nothing to time", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("default")  # SDPA warns why it refuses a call, Inductor of much
SHARE_OF_WORK = {"probe all": 1 / 2, "probe 1/16": 1 / 2 / PERIOD}


def _wanted(case: Case, peer: str) -> bool:
    """The core everywhere; what takes long to compile or to run, at two lengths or one."""
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
