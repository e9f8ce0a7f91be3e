"""Derivatives beyond the first, and transforms, of calls that kernels on a card compute, beside fp64."""

import pytest
import torch
from torch.autograd import functional
from torch.func import grad, jvp, vmap

from hnf_attention import attention

pytestmark = pytest.mark.gpu


def on_the_card(dtype):
    """A function of query, key, value on a card, and on the CPU in fp64: outputs, and statistics in the loss."""

    def loss(query, key, value):
        out, rows = attention(query, key, value, is_causal=True)
        return out.float().square().mean() + rows.entropy.mean()

    tensors = [torch.randn(2, 4, 200, 64, dtype=torch.float64) for _ in range(3)]
    return loss, [x.to(dtype).double() for x in tensors], [x.to("cuda", dtype) for x in tensors]


def near(got, exact, tolerance):
    for x, y in zip(got, exact):
        assert (x.cpu().double() - y).norm() <= tolerance * y.norm()


ON_CARD = {
    "grad": lambda f, a: grad(f, (0, 1, 2))(*a),
    "jvp": lambda f, a: [jvp(f, tuple(a), tuple(a))[1]],
    "vmap of grad": lambda f, a: vmap(grad(f, (0, 1, 2)))(*(x[:, None] for x in a)),
    "vmap of grad, shared keys": lambda f, a: vmap(grad(f, (0, 1, 2)), (0, None, None))(
        a[0][:, None], a[1][:1], a[2][:1]
    ),
    "hessian-vector product": lambda f, a: functional.vhp(f, tuple(a), tuple(a))[1],
    "forward over reverse": lambda f, a: jvp(grad(f, (0, 1, 2)), tuple(a), tuple(a))[1],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transformed", ON_CARD.values(), ids=ON_CARD)
def test_transforms_on_a_card(transformed, dtype):
    loss, exact, given = on_the_card(dtype)
    near(transformed(loss, given), transformed(loss, exact), 1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_a_batch_on_a_card(dtype):
    _, _, (query, key, value) = on_the_card(dtype)
    out = attention(query.requires_grad_(), key, value)[0]
    cotangents = torch.randn(3, *out.shape, device="cuda", dtype=dtype)
    (got,) = torch.autograd.grad(out, query, cotangents, retain_graph=True, is_grads_batched=True)
    for one, cotangent in zip(got, cotangents):
        assert torch.equal(one, torch.autograd.grad(out, query, cotangent, retain_graph=True)[0])
