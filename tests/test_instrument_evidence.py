"""Attention that is written out is known by what it computes, and no other softmax is taken for it."""

import pytest
import torch
import torch.nn.functional as F
from attention_models import Attention, x
from torch import nn

from hnf_attention import instrument


class SABlock(Attention):
    """Attention by hand, in a class whose name does not say so. product, weigh: how it multiplies."""

    def __init__(self, weigh="@", dropout=0.0, cast=None, **options):
        super().__init__(**options)
        self.weigh, self.dropout, self.cast = weigh, nn.Dropout(dropout), cast

    def forward(self, inputs):
        q, k, v = self.split(inputs)
        weights = self.dropout((self.scores(q, k) / 2).softmax(-1))
        if self.cast is not None:
            weights, v = weights.to(self.cast), v.to(self.cast)
        return self.weighted(weights, v).to(inputs.dtype).transpose(1, 2).flatten(2)

    def scores(self, q, k):
        if self.weigh == "einsum":
            return torch.einsum("bhqd,bhkd->bhqk", q, k)
        if self.weigh == "bmm":
            return torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).unflatten(0, q.shape[:2])
        if self.weigh == "baddbmm":
            bias = torch.zeros(1, 1, k.shape[2])
            product = bias.baddbmm(batch1=q.flatten(0, 1), batch2=k.flatten(0, 1).mT, beta=1.0, alpha=1.0)
            return product.view(*q.shape[:2], q.shape[2], k.shape[2])
        return torch.matmul(q, k.mT) if self.weigh == "matmul" else q @ k.mT

    def weighted(self, weights, v):
        if self.weigh == "einsum":
            return torch.einsum("bhqk,bhkd->bhqd", weights, v)
        if self.weigh in ("bmm", "baddbmm"):
            return torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).unflatten(0, v.shape[:2])
        return weights.matmul(v) if self.weigh == "matmul" else weights @ v


def _coverage(model, inputs=None, forwards=1, **options):
    seen = []
    with torch.no_grad(), instrument(model, **options) as handle:
        handle.on_measure = seen.append
        for _ in range(forwards):
            model(x() if inputs is None else inputs)
    return handle.coverage, seen


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"cast": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("weigh", ["@", "matmul", "einsum", "bmm", "baddbmm"])
def test_attention_under_any_name_is_measured(weigh, options):
    model = nn.Sequential(SABlock(weigh, **options), SABlock(weigh, **options))
    coverage, seen = _coverage(model, strict=True)
    assert coverage.measured == {"0": "probe (softmax)", "1": "probe (softmax)"}
    assert [tuple(m.rows.lse.shape) for m in seen] == [(2, 4, 20)] * 2


def test_inference_mode_and_double_precision():
    model = SABlock().double()
    with torch.inference_mode(), instrument(model, strict=True) as handle:
        model(x().double())
    assert handle.latest[""].rows.entropy.isfinite().all()


class Head(nn.Module):
    """One head in a module, as lectures write it. It knows how many heads there are beside it."""

    def __init__(self):
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(16, 4, bias=False) for _ in range(3))
        self.num_heads = 4

    def forward(self, inputs):
        scores = self.query(inputs) @ self.key(inputs).transpose(-2, -1)
        self.truth = torch.special.entr(scores.double().softmax(-1)).sum(-1)
        return F.softmax(scores, dim=-1) @ self.value(inputs)


@pytest.mark.parametrize("shape", [(2, 20, 16), (3, 5, 16), (20, 16)], ids=str)
def test_one_head_in_a_module(shape):
    model, inputs = Head(), x(*shape)
    with instrument(model, strict=True) as handle:
        model(inputs)
    entropy = handle.latest[""].rows.entropy
    assert entropy.shape[1] == 1
    torch.testing.assert_close(entropy[:, 0].double(), model.truth.view_as(entropy[:, 0]), atol=1e-5, rtol=0)


class SoftMax(nn.Module):
    """Without parameters, it is a part of the module that calls it."""

    def forward(self, scores):
        return torch.softmax(scores, dim=-1)


class Product(nn.Module):
    def forward(self, one, other):
        return one @ other


class InParts(SABlock):
    def __init__(self):
        super().__init__()
        self.first, self.softmax, self.second = Product(), SoftMax(), Product()

    def forward(self, inputs):
        q, k, v = self.split(inputs)
        return self.second(self.softmax(self.first(q, k.mT)), v).transpose(1, 2).flatten(2)


def test_products_and_softmax_in_modules_of_their_own():
    coverage, seen = _coverage(nn.Sequential(InParts(), InParts()), strict=True)
    assert list(coverage.measured) == ["0", "1"] and len(seen) == 2


class Logging(Attention):
    """Logs the entropy of its attention before it computes the attention again."""

    def __init__(self, by_hand):
        super().__init__()
        self.by_hand = by_hand

    def forward(self, inputs):
        q, k, v = self.split(inputs)
        weights = (q @ k.mT / 2).softmax(-1)
        self.entropy = torch.special.entr(weights).sum(-1).mean()
        if not self.by_hand:
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("length", [20, 4])  # as many keys as features too
def test_weights_that_are_logged_are_not_measured_twice(by_hand, length):
    coverage, seen = _coverage(Logging(by_hand), x(2, length, 16), forwards=2, strict=True)
    assert len(seen) == 2 and not coverage.not_measured


class Only(SABlock):
    """Looks at its weights, and multiplies them with nothing."""

    def forward(self, inputs):
        q, k, _ = self.split(inputs)
        return inputs * (q @ k.mT).softmax(-1).amax()


def test_weights_that_meet_no_values_are_listed():
    coverage, seen = _coverage(Only())
    assert not seen and "multiplied with values" in coverage.not_measured[""]
    with pytest.raises(RuntimeError, match="multiplied with values"):
        _coverage(Only(), strict=True)


class LinearAttention(Attention):
    """Softmax over the features of queries and over the positions of keys."""

    def __init__(self, positions_last):
        super().__init__()
        self.positions_last = positions_last

    def forward(self, inputs):
        q, k, v = self.split(inputs)
        if self.positions_last:
            k = k.mT.softmax(-1)
            return (q.softmax(-1) @ (k @ v)).transpose(1, 2).flatten(2)
        return (q.softmax(-1) @ (k.softmax(-2).mT @ v)).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("length", [20, 16, 4])
@pytest.mark.parametrize("positions_last", [True, False])
def test_linear_attention_is_listed_and_not_measured(positions_last, length):
    model = nn.Sequential(*(LinearAttention(positions_last) for _ in range(3)))
    coverage, seen = _coverage(model, x(2, length, 16), forwards=2)
    assert not seen and list(coverage.not_measured) == ["0", "1", "2"]
    if length != 16:  # as many as features
        assert all("not seen to be a product" in why for why in coverage.not_measured.values())


class Gated(SABlock):
    """A mixture of experts beside its attention, whose gate is a softmax over a product with learned vectors."""

    def __init__(self, by_einsum):
        super().__init__()
        self.experts, self.gate = nn.Parameter(torch.randn(6, 16, 16)), nn.Parameter(torch.randn(16, 6))
        self.by_einsum = by_einsum

    def forward(self, inputs):
        hidden = super().forward(inputs)
        product = torch.einsum("bnd,de->bne", hidden, self.gate) if self.by_einsum else hidden @ self.gate
        return torch.einsum("bne,edf,bnd->bnf", product.softmax(-1), self.experts, hidden)


class Attentive(Gated):
    """Named like attention."""


@pytest.mark.parametrize("make", [Gated, type("GatedAttention", (Gated,), {})])
@pytest.mark.parametrize("by_einsum", [True, False])
def test_a_gate_over_experts_is_no_attention(by_einsum, make):
    coverage, seen = _coverage(make(by_einsum), strict=True)
    assert len(seen) == 1 and seen[0].rows.lse.shape == (2, 4, 20) and not coverage.not_measured


class LanguageModel(nn.Module):
    """With tied weights and its output distribution. num_heads: as an attention module says it."""

    num_heads = 4

    def __init__(self):
        super().__init__()
        self.embedding, self.attention = nn.Embedding(50, 16), SABlock()

    def forward(self, tokens):
        hidden = self.attention(self.embedding(tokens))
        return (hidden @ self.embedding.weight.T).softmax(-1)


def test_a_distribution_over_a_vocabulary_is_no_attention():
    coverage, seen = _coverage(LanguageModel(), torch.randint(0, 50, (4, 20)), strict=True)
    assert list(coverage.measured) == ["attention"] and len(seen) == 1


class KeysFirst(SABlock):
    """Its softmax is over the dimension before the last."""

    def forward(self, inputs):
        q, k, v = self.split(inputs)
        return ((k @ q.mT).softmax(-2).mT @ v).transpose(1, 2).flatten(2)


class Additive(SABlock):
    """Bahdanau's: its scores are no product of queries and keys."""

    def forward(self, inputs):
        q, k, v = self.split(inputs)
        scores = (q[:, :, :, None] + k[:, :, None]).tanh().sum(-1)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("make", "why"), [(KeysFirst, "is over dimension 2 of"), (Additive, "not seen to be a product")]
)
def test_attention_that_cannot_be_measured_is_listed(make, why):
    coverage, seen = _coverage(nn.Sequential(make()))
    assert not seen and why in coverage.not_measured["0"]
    with pytest.raises(RuntimeError, match=why):
        _coverage(make(), strict=True)


@pytest.mark.parametrize("named", ["Additive", Additive, SABlock])
def test_a_class_that_is_given_is_believed(named):
    coverage, seen = _coverage(nn.Sequential(Additive()), strict=True, attention_classes=[named])
    assert list(coverage.measured) == ["0"] and len(seen) == 1


@pytest.mark.parametrize(
    ("given", "error"),
    [(["Missing"], ValueError), ([nn.Conv2d], ValueError), ("SABlock", TypeError), ([3], TypeError)],
    ids=str,
)
def test_classes_that_are_none_of_the_models(given, error):
    model = SABlock()
    with pytest.raises(error, match="attention_classes"):
        instrument(model, attention_classes=given)
    with instrument(model):
        pass


class Image(nn.Module):
    """Self-attention over the places of an image, (B, C, height, width)."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(8, 8, 1) for _ in range(3))

    def forward(self, image):
        q, k, v = (f(image).flatten(2) for f in (self.q, self.k, self.v))
        weights = torch.bmm(q.mT, k).softmax(-1)
        return torch.bmm(v, weights.mT).view_as(image)


def test_an_image_has_one_head_of_all_its_places():
    coverage, seen = _coverage(Image(), x(3, 8, 4, 5), strict=True)
    assert seen[0].rows.lse.shape == (3, 1, 20) and coverage.measured == {"": "probe (softmax)"}


def test_everything_is_put_back():
    names = ("matmul", "mm", "bmm", "baddbmm", "einsum", "softmax")
    before = [getattr(torch, name) for name in names], dict(vars(torch.Tensor)), torch.functional.einsum
    with instrument(SABlock()):
        assert torch.matmul is not before[0][0] and "__matmul__" in vars(torch.Tensor)
    assert (
        [getattr(torch, name) for name in names],
        dict(vars(torch.Tensor)),
        torch.functional.einsum,
    ) == before


class Graph(nn.Module):
    """Attention over nodes that a sparse matrix has mixed."""

    def __init__(self):
        super().__init__()
        self.attention = SABlock()

    def forward(self, inputs):
        adjacency = torch.eye(inputs.shape[1]).to_sparse()
        mixed = torch.stack([torch.matmul(adjacency, adjacency @ adjacency.mm(each)) for each in inputs])
        return self.attention(mixed)


def test_sparse_tensors_are_left_alone():
    coverage, seen = _coverage(Graph(), strict=True)
    assert list(coverage.measured) == ["attention"] and len(seen) == 1
