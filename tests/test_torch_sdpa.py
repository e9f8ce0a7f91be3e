"""This project's attention in place of PyTorch's flash kernel: registry, operators, gradients, statistics.

PyTorch calls the operators for CUDA only. Here they are registered for the CPU, too, and called by their names.
"""

import importlib
import itertools
import sys

import pytest
import torch
from compat_helpers import carried_by
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hnf_attention import MultiheadAttention, instrument
from hnf_attention.engine import library
from hnf_attention.nn import row_stats
from hnf_attention.reference import attention as reference
from hnf_attention.reference.options import Options

attention = torch.nn.attention
if not hasattr(attention, "register_flash_attention_impl"):
    pytest.skip("torch < 2.11 has no registry of flash kernels", allow_module_level=True)
from hnf_attention.integrations import torch_sdpa  # noqa: E402

operator = torch.ops.aten._scaled_dot_product_flash_attention


@pytest.fixture
def on_cpu():
    registration = torch_sdpa.Registration("CPU")
    yield
    registration.remove()


@pytest.fixture
def activated():
    torch_sdpa.activate()
    yield
    torch_sdpa.deactivate()


def qkv(heads=4, key_heads=2, dtype=torch.float32, head_dim=8):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, 9, head_dim), *[(2, key_heads, 11, head_dim)] * 2]
    return [torch.randn(x, generator=generator).to(dtype).requires_grad_() for x in shapes]


class Layer(nn.Module):
    def forward(self, q, k, v, causal=True, scale=0.3):
        return operator(q, k, v, 0.0, causal, False, scale=scale)[0]


def test_it_is_activated_by_one_line_and_put_back():
    assert torch_sdpa.NAME in attention.list_flash_attention_impls()
    assert attention.current_flash_attention_impl() is None  # importing activates nothing
    torch_sdpa.activate()
    assert attention.current_flash_attention_impl() == torch_sdpa.NAME
    torch_sdpa.deactivate()
    torch_sdpa.deactivate()
    assert attention.current_flash_attention_impl() is None
    attention.activate_flash_attention_impl(torch_sdpa.NAME)
    assert attention.current_flash_attention_impl() == torch_sdpa.NAME
    attention.restore_flash_attention_impl()


def test_another_implementation_is_left_alone(monkeypatch):
    monkeypatch.setattr(attention, "current_flash_attention_impl", lambda: "FA4")
    monkeypatch.setattr(attention, "restore_flash_attention_impl", None)
    torch_sdpa.deactivate()


def test_an_older_torch_is_refused(monkeypatch):
    monkeypatch.delattr(attention, "register_flash_attention_impl")
    monkeypatch.delitem(sys.modules, torch_sdpa.__name__)
    with pytest.raises(ImportError, match="expected torch >= 2.11, .* got torch"):
        importlib.import_module(torch_sdpa.__name__)


@carried_by("flash_operators")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_lse_and_gradients_against_fp64(on_cpu, causal, dtype):
    given = qkv(dtype=dtype)
    out, lse, *rest = operator(*given, 0.0, causal, False, scale=0.3)
    assert rest[:4] == [None, None, 9, 11] and [x.dtype for x in rest[4:6]] == [torch.uint64] * 2
    assert out.dtype == dtype and lse.dtype == torch.float32 and not lse.requires_grad
    exact = [x.detach().double().requires_grad_() for x in given]
    wanted, rows = reference.attention(*exact, Options(None, causal, 0.3, None, None, None))
    eps = torch.finfo(dtype).eps
    assert (out.double() - wanted).abs().max() <= 4 * eps * wanted.abs().max()
    torch.testing.assert_close(lse.double(), rows.lse, atol=2e-6, rtol=0)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(out, given, cotangent.to(dtype))
    expected = torch.autograd.grad(wanted, exact, cotangent.to(dtype).double())
    assert all((a.double() - b).norm() <= 4 * eps * b.norm() for a, b in zip(found, expected))


def test_the_default_scale_is_that_of_sdpa(on_cpu):
    given = qkv()
    out = operator(*given)[0]
    torch.testing.assert_close(out, nn.functional.scaled_dot_product_attention(*given, enable_gqa=True))


def test_results_have_the_strides_that_a_compiled_graph_expects(on_cpu):
    q, k, v = (x.detach().permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for x in qkv(4, 4))
    q.requires_grad_()
    out = operator(q, k, v)[0]
    assert out.stride() == torch.empty_like(q).stride()
    assert torch.autograd.grad(out.sum(), q)[0].stride() == torch.empty_like(q).stride()


@pytest.mark.parametrize("copied", [False, True])
def test_the_backward_takes_what_was_allowed_when_the_forward_ran(on_cpu, monkeypatch, copied):
    chosen, given, original = [], qkv(), torch_sdpa.engines.backward
    hooks = torch.autograd.graph.saved_tensors_hooks(torch.clone if copied else lambda x: x, lambda x: x)

    def backward(call, inputs, mask_gradient, choice):
        chosen.append(choice)
        return original(call, inputs, mask_gradient, choice)

    monkeypatch.setattr(torch_sdpa.engines, "backward", backward)
    with sdpa_kernel(SDPBackend.MATH), hooks:
        wanted = library.choice()
        out = operator(*given, 0.0, True)[0]
    torch.autograd.grad(out.sum(), given)
    # A copy of what was saved tells nothing, so what is in force now counts.
    assert wanted != library.choice() and chosen == [library.choice() if copied else wanted]


@pytest.mark.parametrize("flags", [*itertools.product([False, True], repeat=3)])
def test_a_seed_says_what_was_allowed(flags):
    choice = library.Choice(*flags)
    seed = torch_sdpa._seed_of(choice, torch.device("cpu"))
    assert seed.shape == (2,) and torch_sdpa._choice_of(seed) == choice
    assert torch_sdpa._choice_of(torch.zeros(2, dtype=torch.uint64)) == library.choice()  # one of PyTorch's


@pytest.mark.slow
@pytest.mark.exhaustive
def test_it_runs_in_a_compiled_graph(on_cpu):
    given, layer = qkv(), Layer()
    expected = layer(*given)
    fast = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(fast(*given), expected)


def test_dropout_without_a_kernel_of_pytorch_is_refused(on_cpu):
    with pytest.raises(RuntimeError, match="expected dropout_p=0 .* got dropout_p=0.1"):
        operator(*qkv(), 0.1)


def test_the_module_that_runs_keeps_the_statistics(on_cpu):
    layer, given = Layer(), qkv()
    net = nn.Sequential(layer)
    net.forward = lambda *args: layer(*args)
    net(*given).sum().backward()
    assert row_stats(net) is None and row_stats(layer).lse.shape == (2, 4, 9)
    assert torch.equal(row_stats(layer).lse, operator(*given, 0.0, True, False, scale=0.3)[1])


def test_a_checkpoints_second_forward_leaves_the_statistics(on_cpu):
    layer, given = Layer(), qkv()
    out = torch.utils.checkpoint.checkpoint(layer, *given, use_reentrant=False)
    rows = row_stats(layer)
    out.sum().backward()
    assert row_stats(layer) is rows


def test_instrument_takes_the_statistics_of_the_kernel(on_cpu, monkeypatch):
    """A function in the place of SDPA that calls the operator, as PyTorch's own does on CUDA."""
    functional = torch.nn.functional

    def by_operator(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        return operator(q, k, v, dropout_p, is_causal, False, scale=scale)[0]

    class Model(nn.Module):
        def forward(self, q, k, v):
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", by_operator)
    model, given = Model(), qkv()
    with instrument(model) as handle, instrument(model, "probe", holder=model) as second:
        handle._probe = second._probe = None
        model(*given)
        assert handle.latest[""].rows is second.latest[""].rows is row_stats(model)
        assert handle.coverage.measured == {"": "fused (scaled_dot_product_attention)"}


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [60, 64, 128])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_sdpa_on_a_card_is_ours(activated, causal, head_dim, key_heads):
    def of_sdpa(tensors):
        out = nn.functional.scaled_dot_product_attention(
            *tensors, is_causal=causal, enable_gqa=key_heads != 4
        )
        return out, *torch.autograd.grad(out.square().sum(), tensors)

    class Model(nn.Module):
        def forward(self, *tensors):
            return of_sdpa(tensors)

    given = [x.detach().cuda() for x in qkv(4, key_heads, torch.bfloat16, head_dim)]
    if causal:  # PyTorch's flash kernel takes a causal mask of as many queries as keys alone
        given[1:] = [x[:, :, : given[0].shape[2]] for x in given[1:]]
    given = [x.requires_grad_() for x in given]
    model = Model()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        mine = model(*given)
    assert row_stats(model).lse.shape == (2, 4, 9)
    with sdpa_kernel(SDPBackend.MATH):
        exact = of_sdpa([x.detach().double().requires_grad_() for x in given])
    for a, b in zip(mine, exact):
        assert a.shape == b.shape and (a.double() - b).norm() <= 2e-2 * b.norm()


@pytest.mark.gpu
def test_dropout_and_what_comes_after_stay_pytorchs_on_a_card():
    given = [x.detach().cuda().requires_grad_() for x in qkv(4, 4, torch.bfloat16, 64)]

    def step():
        torch.manual_seed(0)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = nn.functional.scaled_dot_product_attention(*given, dropout_p=0.2)
        return out, *torch.autograd.grad(out.float().square().sum(), given)

    expected = step()
    torch_sdpa.activate()
    during = step()
    torch_sdpa.deactivate()
    for found in (during, step()):
        assert all(map(torch.equal, found, expected))


@pytest.mark.gpu
def test_a_compiled_model_on_a_card_runs_ours(activated):
    module = nn.MultiheadAttention(128, 2, batch_first=True, device="cuda", dtype=torch.bfloat16)
    ours = MultiheadAttention(128, 2, batch_first=True, device="cuda", dtype=torch.bfloat16)
    ours.load_state_dict(module.state_dict())
    x = torch.randn(2, 65, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    fast = torch.compile(module, fullgraph=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = fast(x, x, x, need_weights=False)[0]
        torch.testing.assert_close(out, ours(x, x, x, need_weights=False)[0], atol=2e-2, rtol=2e-2)
        out.sum().backward()
    assert x.grad.isfinite().all()
