"""Which of SDPA's kernels the user allows: an instrumented model obeys it."""

import pytest
import torch
import torch.nn.functional as F
from attention_models import Attention, x
from torch.nn.attention import SDPBackend, sdpa_kernel

from hnf_attention import MultiheadAttention, instrument
from hnf_attention.instrumentation.interceptors.sdpa import ONLY_MATH

FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]


def coverage(handle):
    return next(iter(handle.coverage.measured.values()))


@pytest.mark.parametrize("mode", ["fused", "probe"])
def test_with_math_alone_the_output_is_pytorchs_and_measured_beside(mode):
    model, inputs = Attention(), x()
    with sdpa_kernel(SDPBackend.MATH):
        plain = model(inputs)
        with instrument(model, mode) as handle:
            assert torch.equal(model(inputs), plain)
            assert handle.latest and coverage(handle).startswith("probe")
            assert (ONLY_MATH in coverage(handle)) == (mode == "fused")


@pytest.mark.parametrize("allowed", FUSED)
def test_one_fused_kernel_is_enough_for_ours(allowed):
    model, inputs = Attention(), x()
    with instrument(model, "fused") as handle:
        with sdpa_kernel([allowed, SDPBackend.MATH]):
            model(inputs)
        assert coverage(handle).startswith("fused")


def test_switches_for_the_whole_process_count_as_well():
    model, inputs = Attention(), x()
    switches = [
        torch.backends.cuda.enable_flash_sdp,
        torch.backends.cuda.enable_mem_efficient_sdp,
        torch.backends.cuda.enable_cudnn_sdp,
    ]
    with instrument(model, "fused") as handle:
        try:
            for switch in switches:
                assert not handle.latest or coverage(handle).startswith("fused")
                switch(False)
                model(inputs)
            assert ONLY_MATH in coverage(handle)
        finally:
            for switch in switches:
                switch(True)
        model(inputs)
        assert coverage(handle).startswith("fused")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_layer_under_math_is_run_again_by_pytorch(use_reentrant):
    model, inputs = Attention(), x().requires_grad_()
    with instrument(model, "fused") as handle, sdpa_kernel(SDPBackend.MATH):
        torch.utils.checkpoint.checkpoint(model, inputs, use_reentrant=use_reentrant).sum().backward()
        assert ONLY_MATH in coverage(handle)
    got, inputs.grad = inputs.grad, None
    with sdpa_kernel(SDPBackend.MATH):
        model(inputs).sum().backward()
    assert torch.equal(got, inputs.grad)


def test_our_module_obeys_as_well():
    module = MultiheadAttention(16, 4, batch_first=True)
    inputs = torch.randn(2, 7, 16)
    with sdpa_kernel(SDPBackend.MATH):
        plain = torch.nn.MultiheadAttention.forward(module, inputs, inputs, inputs, need_weights=False)[0]
        assert torch.equal(module(inputs, inputs, inputs, need_weights=False)[0], plain)
    assert module.row_stats is not None


def test_what_no_kernel_may_compute_fails_as_it_does_without_us():
    model, inputs = Attention(), x()
    seen = []
    for instrumented in (False, True):
        with sdpa_kernel(FUSED[2]), pytest.raises(RuntimeError) as raised:
            if instrumented:
                with instrument(model, "fused"):
                    torch.backends.cuda.enable_cudnn_sdp(False)
                    model(inputs)
            else:
                torch.backends.cuda.enable_cudnn_sdp(False)
                model(inputs)
        seen.append(str(raised.value))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("warn_only", [False, True])
def test_deterministic_mode_keeps_fused(warn_only):
    model, inputs = Attention(), x().requires_grad_()
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        with instrument(model, "fused") as handle:
            gradients = [torch.autograd.grad(model(inputs).sum(), inputs)[0] for _ in range(2)]
            assert coverage(handle).startswith("fused")
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*gradients)


def test_sdpa_is_called_as_before_where_ours_steps_back(monkeypatch):
    calls = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    model, inputs = Attention(), x()
    with instrument(model, "fused"):
        model(inputs)
        assert not calls
        with sdpa_kernel(SDPBackend.MATH):
            model(inputs)
        assert calls == [1]
