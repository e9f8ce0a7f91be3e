"""Traces on a card: the backward that autograd runs in threads of its own, cuDNN's fault, and the injected faults."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hnf_attention import trace_non_finite
from hnf_attention.diagnosis.triage import causes

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[1]


class LowScores(nn.Module):
    """One attention whose scores all lie near -122 in head 1 and near 0 in the other heads."""

    def __init__(self, score=-122.0, keys=64, head_dim=64):
        super().__init__()
        generator = torch.Generator("cuda").manual_seed(0)
        q, k, v = (torch.randn(1, 3, keys, head_dim, device="cuda", generator=generator) for _ in range(3))
        size = math.sqrt(abs(score) * head_dim**0.5)
        q[:, 1, :, 0], k[:, 1, :, 0] = size, -size
        self.q, self.k, self.v = (nn.Parameter(x.bfloat16()) for x in (q, k, v))

    def forward(self):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(self.q, self.k, self.v)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = LowScores()

    def forward(self):
        return self.attention().float().square().sum()


def test_the_backward_of_cudnn_for_low_lse_is_named_with_its_version(tmp_path):
    if torch.backends.cudnn.version() != 91900:
        pytest.skip("the fault is known of cuDNN 9.19")
    model = Outer()
    trace = trace_non_finite(model, model, folder=tmp_path)
    assert (trace.cause, trace.phase, trace.layer, trace.head) == (
        causes.KERNEL,
        "backward",
        "attention",
        1,
    ), trace
    assert "cudnn_attention_backward" in trace.operation and "cuDNN 91900" in trace.evidence
    assert "exp(-lse) is inf in float32 below -88.7" in trace.evidence
    shown = subprocess.run(
        [sys.executable, str(tmp_path / "reproduce.py")], capture_output=True, text=True, check=True
    )
    assert "NOT FINITE" in shown.stdout.splitlines()[-3:][0] + shown.stdout


def test_a_gradient_is_traced_to_the_module_of_its_forward():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)).cuda()
    model[1].register_forward_hook(lambda _m, _i, out: out + (out - out.detach()).abs().sqrt())
    trace = trace_non_finite(model, lambda: model(torch.ones(2, 4, device="cuda")).sum())
    assert (trace.cause, trace.phase, trace.layer) == (causes.UNDEFINED, "backward", "1"), trace


@pytest.mark.slow
def test_injected_faults_are_found_on_a_card():
    done = subprocess.run(
        [sys.executable, "-m", "bench.validation.triage_causes", "--places", "1", "--device", "cuda"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
