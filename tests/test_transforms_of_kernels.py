"""Transforms and second derivatives of calls that kernels compute, on a card or interpreted, beside fp64."""

from contextlib import nullcontext

import pytest
import torch
from torch.autograd import functional
from torch.func import grad, jvp, vmap

from hnf_attention import attention
from hnf_attention.engine import engines

ON_CARD = torch.cuda.is_available()
pytestmark = [
    pytest.mark.usefixtures("kernels"),
    *([] if ON_CARD else [pytest.mark.slow]),
]
# The interpreter adds up the bits of bf16 as integers.
DTYPES = [torch.float32, torch.bfloat16 if ON_CARD else torch.float16]
LENGTH, HEAD_DIM = (200, 64) if ON_CARD else (20, 16)


@pytest.fixture
def kernels(monkeypatch):
    """Without a card, the portable kernels compute every call but those in fp64."""
    if ON_CARD:
        return

    def supports(call, card):
        return None if call.query.dtype in engines.KERNEL_DTYPES else "the test compares with fp64"

    backward = (
        engines.Engine("interpreter", supports, engines._triton_backward),
        engines.STATISTICS_BACKWARD[-1],
    )
    forward = (engines.Engine("interpreter", supports, engines._triton_forward), engines.FORWARD[-1])
    monkeypatch.setattr(engines, "FORWARD", forward)
    monkeypatch.setattr(engines, "STATISTICS_BACKWARD", backward)
    monkeypatch.setattr(engines, "output_backward", lambda chosen: backward)
    monkeypatch.setattr(engines, "on_device", lambda query: nullcontext())


def loss(query, key, value):
    out, rows = attention(query, key, value, is_causal=True)
    return out.float().square().mean() + rows.entropy.mean()


def of_the_output(query, key, value):
    return attention(query, key, value, is_causal=True)[0].float().square().mean()


def tensors(dtype, device):
    """query, key, value in fp64 on the CPU, and in the dtype on the device."""
    drawn = [torch.randn(2, 2, LENGTH, HEAD_DIM).to(dtype) for _ in range(3)]
    return [x.double() for x in drawn], [x.to(device) for x in drawn]


TRANSFORMS = {
    "grad": lambda f, a: grad(f, (0, 1, 2))(*a),
    "jvp": lambda f, a: [jvp(f, tuple(a), tuple(a))[1]],
    "vmap of grad": lambda f, a: vmap(grad(f, (0, 1, 2)))(*(x[:, None] for x in a)),
    "vmap of grad, shared keys": lambda f, a: vmap(grad(f, (0, 1, 2)), (0, None, None))(
        a[0][:, None], a[1][:1], a[2][:1]
    ),
    "vector-hessian product": lambda f, a: functional.vhp(f, tuple(a), tuple(a))[1],
    "forward over reverse": lambda f, a: jvp(grad(f, (0, 1, 2)), tuple(a), tuple(a))[1],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [loss, of_the_output])
@pytest.mark.parametrize("transformed", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_of_kernels(transformed, function, dtype, device):
    exact, given = tensors(dtype, device)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for got, wanted in zip(transformed(function, given), transformed(function, exact)):
        assert got.isfinite().all()
        assert (got.cpu().double() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_in_a_batch_are_those_one_by_one(dtype, device):
    query, key, value = tensors(dtype, device)[1]
    out = attention(query.requires_grad_(), key, value)[0]
    cotangents = torch.randn(3, *out.shape).to(out)
    (got,) = torch.autograd.grad(out, query, cotangents, retain_graph=True, is_grads_batched=True)
    for one, cotangent in zip(got, cotangents):
        assert torch.equal(one, torch.autograd.grad(out, query, cotangent, retain_graph=True)[0])
