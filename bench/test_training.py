"""Forward and backward of our attention, with core statistics, beside PyTorch's own kernels, on one GPU.

    python -m pytest bench/test_training.py --benchmark-json=bench/results/training_NAME.json
    python bench/table.py bench/results/training_NAME.json

Inputs are random bf16, B * N = 16k tokens. Work: forward 4 * B * H * M * N * D floating-point operations
and two and a half times as much in the backward (five products instead of two), half under a causal mask.
"entropy" adds a cotangent of entropy, which only our own backward kernel takes.
"""

import pytest
import torch
from timing import cuda_clock
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hnf_attention import attention

if not torch.cuda.is_available():
    pytest.skip("without a GPU there is nothing to time", allow_module_level=True)

TOKENS = 16384
CASES = [
    (head_dim, heads, length, is_causal)
    for head_dim, heads in ((64, 32), (128, 16))
    for length in (4096, 8192)
    for is_causal in (True, False)
]


def _library(q, k, v, is_causal):
    return (scaled_dot_product_attention(q, k, v, is_causal=is_causal),)


def _flash(q, k, v, is_causal):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return _library(q, k, v, is_causal)


def _ours(q, k, v, is_causal):
    return (attention(q, k, v, is_causal=is_causal)[0],)


def _entropy(q, k, v, is_causal):
    out, rows = attention(q, k, v, is_causal=is_causal)
    return out, rows.entropy


PEERS = {"sdpa default": _library, "ours": _ours, "sdpa flash": _flash, "ours, entropy": _entropy}


@pytest.mark.benchmark(timer=cuda_clock, disable_gc=True)
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("head_dim", "heads", "length", "is_causal"), CASES)
def test_training(benchmark, head_dim, heads, length, is_causal, peer):
    torch.manual_seed(0)
    shape = (TOKENS // length, heads, length, head_dim)
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv"]
    benchmark.group = f"D={head_dim} H={heads} N={length} {'causal' if is_causal else 'full'}"
    benchmark.extra_info["flop"] = 14 * inputs[0].numel() * length // (2 if is_causal else 1)
    cotangents = [torch.randn_like(x) for x in PEERS[peer](*inputs, is_causal)]

    def step():
        torch.autograd.grad(PEERS[peer](*inputs, is_causal), inputs, cotangents)

    # Several launches a round queue up, so that the host's part of a launch hides behind the device's.
    benchmark.pedantic(step, rounds=9, iterations=4, warmup_rounds=2)
