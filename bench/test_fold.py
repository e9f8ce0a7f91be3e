"""Device time of the fold of one layer's call, beside the time of the forward before it, on one GPU.

Each timed run replays a graph of 20 calls, because single short calls would wait for the host.

    python -m pytest bench/test_fold.py --benchmark-json=bench/results/fold_h200.json

Bytes: q and k once per query head, 2 * 2 * B * H * N * D in bf16, and 16 per row of statistics. The keys that a group
of heads shares, and what the forward left there, come from the L2 cache. `extra_info["bytes"]` over the median is
the rate, to compare with the card's memory bandwidth (4.3 TB/s measured on the H200).
"""

import pytest
import torch
from timing import cuda_clock

from hnf_attention.engine import api, fold
from hnf_attention.engine.call import check
from hnf_attention.reference.context import UNKNOWN, Context, hidden_keys, largest

CALLS = 20
WHAT = (
    "forward",
    "fold",
    "fold, padding mask",
    "context",
    "context and fold",
    "context and fold, padding mask",
)
CASES = {  # batch, heads, key heads, length, head_dim
    "GPT-2 1k": (1, 12, 12, 1024, 64),
    "GPT-2 16 x 1k": (16, 12, 12, 1024, 64),
    "LLaMA 1B 4 x 4k": (4, 32, 8, 4096, 64),
    "D=128 2 x 8k": (2, 16, 16, 8192, 128),
}


@pytest.mark.benchmark(timer=cuda_clock, disable_gc=True)
@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("name", CASES)
def test_fold(benchmark, name, what):
    torch.manual_seed(0)
    batch, heads, kv_heads, length, head_dim = CASES[name]
    q, k, v = (
        torch.randn(batch, length, h, head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for h in (heads, kv_heads, kv_heads)
    )
    mask = None
    if "mask" in what:
        mask = torch.ones(batch, 1, 1, length, dtype=torch.bool, device="cuda")
    options = check(
        q, k, v, attn_mask=mask, is_causal=True, scale=None, window_size=None, softcap=None, sinks=None
    )
    out, rows = api.attend(q, k, v, options)
    accumulator = fold.new_accumulator(heads, q.device)

    def context():
        """As a measured call has it."""
        hidden = hidden_keys(options, batch, length, length)
        shared = fold.shared_key(q, k, rows, options, hidden)
        return Context(hidden, hidden, shared, largest(v), largest(out))

    def run():
        if what == "forward":
            api.attend(q, k, v, options)
            return
        known = context() if "context" in what else UNKNOWN
        if "fold" in what:
            fold.fold(accumulator, q, k, rows, options, known)

    run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run()
    benchmark.group = name
    benchmark.extra_info["calls"] = CALLS
    benchmark.extra_info["bytes"] = CALLS * (4 * q.numel() + 16 * rows.lse.numel())
    benchmark.pedantic(graph.replay, rounds=15, iterations=5, warmup_rounds=3)
