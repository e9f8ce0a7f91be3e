"""Selective activation checkpointing keeps what some operators gave, and counts them: ours must not be among them."""

import functools

import pytest
import torch
from attention_models import HandWrittenAttention, x
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from hnf_attention.instrumentation import instrument

aten = torch.ops.aten


class Multihead(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=True)[0]


def policy(kept, context, operator, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize(
    "kept",
    [{aten.mm.default, aten.addmm.default}, {aten.exp.default}, {aten.mul.Tensor, aten.sum.dim_IntList}],
    ids=["products", "exp", "sums"],
)
@pytest.mark.parametrize("make", [Multihead, HandWrittenAttention])
def test_gradients_are_those_of_the_plain_model(make, kept):
    torch.manual_seed(0)
    model, inputs = make(), x()
    contexts = functools.partial(create_selective_checkpoint_contexts, functools.partial(policy, kept))

    def gradients():
        model.zero_grad()
        out = checkpoint(model, inputs, use_reentrant=False, context_fn=contexts)
        out.square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    with instrument(model, "probe", strict=True) as handle:
        measured = gradients()
    assert handle.coverage.measured
    assert all(torch.equal(a, b) for a, b in zip(measured, plain))
