"""Forward time of our attention with core statistics beside PyTorch's own kernels, on one GPU.

    python -m pytest bench/test_forward.py --benchmark-json=bench/results/forward_h200.json
    python bench/table.py bench/results/forward_h200.json

Inputs are random bf16, B * N = 16k tokens. Work: 4 * B * H * M * N * D floating-point operations
(two products of 2 each), half of that under a causal mask. Bytes: q, k, v and out once each, 8 * B *
H * N * D in bf16, far below the work at these lengths: all kernels here are bound by arithmetic.
"""

import pytest
import torch
from timing import cuda_clock
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hnf_attention import attention, dispatch
from hnf_attention.validation import check

if not torch.cuda.is_available():
    pytest.skip("without a GPU there is nothing to time", allow_module_level=True)

TOKENS = 16384
CASES = [
    (head_dim, heads, length, is_causal)
    for head_dim, heads in ((64, 32), (128, 16))
    for length in (1024, 2048, 8192, 16384)
    for is_causal in (True, False)
]


def _library(backend):
    def run(q, k, v, is_causal):
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    return run


def _without_stats(q, k, v, is_causal):
    """Our forward with everything but lse compiled out, where the Hopper kernel computes it."""
    from hnf_attention.kernels import hopper

    options = check(
        q, k, v, attn_mask=None, is_causal=is_causal, scale=None, window_size=None, softcap=None, sinks=None
    )
    plan = hopper.plan(q.shape[3], v.shape[3], is_causal, k.shape[2] % hopper.BLOCK_N > 0, False)
    return hopper.forward(q, k, v, options, plan)


PEERS = {
    "sdpa default": lambda q, k, v, c: scaled_dot_product_attention(q, k, v, is_causal=c),
    "ours": lambda q, k, v, c: attention(q, k, v, is_causal=c),
    "sdpa cudnn": _library(SDPBackend.CUDNN_ATTENTION),
    "sdpa flash": _library(SDPBackend.FLASH_ATTENTION),
}
if dispatch.hopper_is_tested(torch.device("cuda", 0)):
    PEERS["ours, lse only"] = _without_stats


@pytest.mark.benchmark(timer=cuda_clock, disable_gc=True)
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("head_dim", "heads", "length", "is_causal"), CASES)
def test_forward(benchmark, head_dim, heads, length, is_causal, peer):
    torch.manual_seed(0)
    shape = (TOKENS // length, heads, length, head_dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    benchmark.group = f"D={head_dim} H={heads} N={length} {'causal' if is_causal else 'full'}"
    benchmark.extra_info["flop"] = 4 * q.numel() * length // (2 if is_causal else 1)
    # Ten launches a round queue up, so that the host's part of a launch is hidden behind the device's.
    with torch.no_grad():
        benchmark.pedantic(PEERS[peer], args=(q, k, v, is_causal), rounds=15, iterations=10, warmup_rounds=3)
