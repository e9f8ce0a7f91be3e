"""PyTorch's own backward kernels on a card: right wherever `attention` takes them, and not taken elsewhere."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hnf_attention import attention
from hnf_attention.engine import engines, library
from hnf_attention.engine.call import check
from hnf_attention.reference import attention as reference

pytestmark = pytest.mark.gpu
# Relative, by norm: the roundings of the weights and of their gradients.
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 1.2e-2}


def problem(queries, keys, head_dim, dtype, lse, batch=2, heads=3, causal=False):
    """(q, k, v, d_out) whose rows have about this lse; one coordinate adds the same number to every score."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(length):
        return torch.randn(batch, heads, length, head_dim, device="cuda", generator=generator)

    q, k, v, d_out = draw(queries), draw(keys), draw(keys), draw(queries)
    score = lse if causal else lse - math.log(keys) - 0.5
    q[..., 0] = math.sqrt(abs(score) * head_dim**0.5)
    k[..., 0] = math.copysign(math.sqrt(abs(score) * head_dim**0.5), score)
    return [x.to(dtype) for x in (q, k, v, d_out)]


def true_gradients(q, k, v, d_out, causal=False, mask=None):
    exact = [x.double() for x in (q, k, v)]
    options = check(
        *exact, attn_mask=mask, is_causal=causal, scale=None, window_size=None, softcap=None, sinks=None
    )
    out, rows = reference.attention(*exact, options)
    return reference.backward(*exact, options, out, rows.lse, rows.entropy, d_out.double(), None, None)[:3]


def gradients(q, k, v, d_out, **options):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(attention(*leaves, **options)[0], leaves, d_out)


def assert_right(found, true, dtype):
    for got, wanted in zip(found, true):
        assert got.isfinite().all()
        # The first coordinate of dq and dk is a sum that cancels, of rounded numbers times a large one.
        error = (got.double() - wanted)[..., 1:].norm() / wanted[..., 1:].norm()
        assert error <= TOLERANCE[dtype]


@pytest.mark.parametrize("head_dim, dtype", [(64, torch.bfloat16), (128, torch.float16)])
@pytest.mark.parametrize("keys", [64, 97, 128, 192, 1216, 1280])
def test_gradients_of_low_scores_are_right_at_every_length(keys, head_dim, dtype):
    shapes = [(queries, False, 2, 3) for queries in dict.fromkeys((1, 64, 97, 128, keys))]
    shapes += [(keys, True, 2, 3), (1, False, 1, 1), (keys, False, 1, 1)]
    for queries, causal, *sizes in shapes:
        for lse in (-80.0, -89.0, -122.0, -1e4):  # the same shape again: cuDNN keeps its plan
            given = problem(queries, keys, head_dim, dtype, lse, *sizes, causal=causal)
            assert_right(gradients(*given, is_causal=causal), true_gradients(*given, causal=causal), dtype)


def _masks(batch, heads, queries, keys):
    shown = torch.rand(batch, heads, queries, keys, device="cuda") < 0.7
    shown[..., 0] = True
    hidden = shown[:, :1].clone()
    hidden[:, :, 1::3] = False  # rows without a visible key
    hidden[-1] = False
    causal = torch.ones(queries, keys, dtype=torch.bool, device="cuda").tril()
    return {"whole": shown, "of keys": shown[:, :1, :1], "hidden rows": hidden, "causal": causal}


@pytest.mark.parametrize("queries, keys", [(256, 256), (200, 200), (130, 384), (192, 192), (33, 65)])
@pytest.mark.parametrize("head_dim, dtype", [(64, torch.bfloat16), (128, torch.float16)])
def test_gradients_under_boolean_masks(queries, keys, head_dim, dtype):
    for mask in _masks(2, 3, queries, keys).values():
        for lse in (4.0, -122.0):
            given = problem(queries, keys, head_dim, dtype, lse)
            found = gradients(*given, attn_mask=mask)
            true = true_gradients(*given, mask=mask[None, None] if mask.dim() == 2 else mask)
            assert_right(found, true, dtype)
            assert (found[0] * ~mask.any(-1, keepdim=True) == 0).all()


@pytest.mark.parametrize(
    "sizes", [(65536, 1, 2, 2), (1, 65536, 2, 2), (2, 2, 1, 1), (2, 2, 5, 1), (65536, 1, 1, 1)]
)
def test_sizes_that_pytorchs_kernels_refuse(sizes):
    batch, heads, queries, keys = sizes
    q, k, v, d_out = (
        torch.randn(batch, heads, n, 64, device="cuda", dtype=torch.bfloat16)
        for n in (queries, keys, keys, queries)
    )
    for got, wanted in zip(gradients(q, k, v, d_out), true_gradients(q, k, v, d_out)):
        # Of 8 million numbers some err by more than most.
        torch.testing.assert_close(got.double(), wanted, rtol=2e-2, atol=5e-2)


def test_tensors_that_start_anywhere_and_repeat():
    whole = torch.randn(4 * 2 * 3 * 200 * 64 + 1, device="cuda", dtype=torch.bfloat16)[1:].view(
        4, 2, 3, 200, 64
    )
    q, k, v, d_out = whole
    assert_right(gradients(q, k, v, d_out), true_gradients(q, k, v, d_out), torch.bfloat16)
    k, v = (x[:, :1].clone().expand(-1, 3, -1, -1) for x in (k, v))
    assert_right(gradients(q, k, v, d_out), true_gradients(q, k, v, d_out), torch.bfloat16)


@pytest.mark.parametrize(
    "backends", [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
)
def test_a_kernel_that_was_turned_off_at_the_forward_is_not_called(backends, monkeypatch):
    called = []
    for name in ("cudnn_backward", "flash_backward"):
        original = getattr(library.compat, name)

        def noted(*args, name=name, original=original, **kwargs):
            called.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(library.compat, name, noted)
    q, k, v, d_out = problem(256, 256, 64, torch.bfloat16, 4.0)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    card = engines.card_of(q.device)
    wanted = []
    for name, runs in (
        ("cudnn_backward", library._cudnn_runs_on),
        ("flash_backward", library._flash_runs_on),
    ):
        if runs(card) is None and backends.name.lower().startswith(name[:5]):
            wanted.append(name)
    with sdpa_kernel(backends):
        out = attention(*leaves)[0]
    found = torch.autograd.grad(out, leaves, d_out)
    assert called == wanted
    assert_right(found, true_gradients(q.detach(), k.detach(), v.detach(), d_out), torch.bfloat16)


def test_the_fault_is_cudnns_own():
    """If this fails, cuDNN has repaired its backward: `library.CUDNN_TESTED` may take more shapes."""
    given = problem(64, 64, 64, torch.bfloat16, -122.0)
    if library._cudnn_runs_on(engines.card_of(given[0].device)) is not None:
        pytest.skip("PyTorch takes no cuDNN here")
    leaves = [x.requires_grad_() for x in given[:3]]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = scaled_dot_product_attention(*leaves)
    assert not all(x.isfinite().all() for x in torch.autograd.grad(out, leaves, given[3]))
