"""Attention over one sequence (N, D), without a batch: it is measured or listed, and a classifier (B, D) is neither."""

import pytest
import torch
from attention_models import x
from torch import nn

from hnf_attention import instrument


class Unbatched(nn.Module):
    """Softmax attention over a sequence (N, 16). multiply: of two matrices. heads: 1, or as many as it splits into."""

    def __init__(self, multiply, heads=1):
        super().__init__()
        self.qkv, self.multiply, self.heads = nn.Linear(16, 48), multiply, heads

    def forward(self, inputs):
        q, k, v = self.qkv(inputs).chunk(3, -1)
        if self.heads > 1:
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(0, 1) for t in (q, k, v))
        weights = self.multiply(q, k.mT).softmax(-1)
        self.truth = torch.special.entr(weights.double()).sum(-1).view(1, self.heads, -1)
        return self.multiply(weights, v)


class Beside(nn.Module):
    """The layer in front of an attention that is always measured."""

    def __init__(self, first):
        super().__init__()
        self.first, self.second = first, nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, inputs):
        hidden = self.first(inputs)[None]
        return self.second(hidden, hidden, hidden, need_weights=False)[0]


def _by_sums(one, other):
    """A product that no interceptor sees."""
    return (one[..., None] * other[..., None, :, :]).sum(-2)


PRODUCTS = {
    "method": lambda a, b: a.mm(b),
    "function": lambda a, b: torch.mm(input=a, mat2=b),
    "out": lambda a, b: torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1])),
}


@pytest.mark.parametrize("multiply", PRODUCTS.values(), ids=PRODUCTS)
def test_products_of_two_matrices_are_seen(multiply):
    model = Beside(Unbatched(multiply))
    with torch.no_grad(), instrument(model, strict=True) as handle:
        model(x(40, 16))
    assert list(handle.coverage.measured) == ["first", "second"]
    entropy = handle.latest["first"].rows.entropy
    torch.testing.assert_close(entropy.double(), model.first.truth, atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [2, 40])
def test_several_heads_of_one_sequence(length):
    model = Unbatched(lambda a, b: a @ b, heads=2)
    model.num_heads = 2
    with torch.no_grad(), instrument(model, strict=True) as handle:
        model(x(length, 16))
    torch.testing.assert_close(handle.latest[""].rows.entropy.double(), model.truth, atol=1e-5, rtol=0)


def test_attention_over_one_sequence_that_is_not_recognised_is_listed():
    model = Beside(Unbatched(_by_sums))
    with torch.no_grad(), instrument(model) as handle:
        model(x(40, 16))
    assert list(handle.coverage.measured) == ["second"]
    assert "not seen to be a product" in handle.coverage.not_measured["first"]


class Classifier(nn.Module):
    """A head (B, classes) whose output goes through a softmax, of a function or of a module."""

    def __init__(self, classes, module):
        super().__init__()
        self.head, self.module = nn.Linear(16, classes), nn.Softmax(-1) if module else None

    def forward(self, inputs):
        logits = self.head(inputs)
        return logits.softmax(-1) if self.module is None else self.module(logits)


@pytest.mark.parametrize("module", [False, True])
@pytest.mark.parametrize(("batch", "classes"), [(10, 10), (12, 10), (16, 16), (10, 16)])
def test_a_classifier_is_no_attention(batch, classes, module):
    for model in (Classifier(classes, module), nn.Sequential(nn.Linear(16, classes), nn.Softmax(-1))):
        with torch.no_grad(), instrument(model) as handle:
            model(x(batch, 16))
        assert not handle.coverage.measured and not handle.coverage.not_measured
