"""Tangents and second derivatives of instrumented models, and of the drop-in module."""

import pytest
import torch
from compat_helpers import carried_by
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from hnf_attention import MultiheadAttention, instrument
from hnf_attention.engine import plain


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(4, 4)

    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(self.project(x), x, x)


@pytest.mark.parametrize("mode", ["probe", "fused", "auto"])
@carried_by("forward_mode_enabled", "without_forward_mode")
def test_an_instrumented_model_has_the_tangent_of_its_own_attention(mode, monkeypatch):
    model, x = Net(), torch.randn(1, 2, 5, 4)
    monkeypatch.setattr(plain, "attend", None)  # forward mode needs it, a measurement does not

    def tangent():
        # PyTorch's other kernels have no forward mode.
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            return forward_ad.unpack_dual(model(forward_ad.make_dual(x, 2 * x))).tangent

    wanted = tangent()
    with instrument(model, mode=mode) as handle:
        assert torch.equal(tangent(), wanted)
        assert handle.latest[""].rows.lse.shape == (1, 2, 5)
    assert handle.coverage.measured[""].startswith("probe") and not handle.coverage.not_measured


def test_a_gradient_penalty_of_a_fused_model_is_that_of_the_model():
    model, x = Net().double(), torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)

    def penalty():
        (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), list(model.parameters()))

    with sdpa_kernel(SDPBackend.MATH):  # PyTorch's other kernels have no second derivative
        wanted = penalty()
    with instrument(model, mode="fused") as handle:
        torch.testing.assert_close(penalty(), wanted)
    assert handle.coverage.measured[""].startswith("fused")


def test_the_drop_in_module_has_the_derivatives_of_pytorchs():
    ours = MultiheadAttention(8, 2, batch_first=True).double()
    theirs = nn.MultiheadAttention(8, 2, batch_first=True).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)

    def derivatives(module):
        with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            dual = forward_ad.make_dual(x.detach(), 2 * x.detach())
            tangent = forward_ad.unpack_dual(module(dual, dual, dual, need_weights=False)[0]).tangent
        with sdpa_kernel(SDPBackend.MATH):
            out = module(x, x, x, need_weights=False)[0]
            (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
            return tangent, *torch.autograd.grad(first.square().sum(), [x, *module.parameters()])

    torch.testing.assert_close(derivatives(ours), derivatives(theirs))
