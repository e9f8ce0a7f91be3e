"""Coverage: every attention is measured or listed with its reason."""

import pytest
import torch
import torch.nn.functional as F
from attention_models import Attention, Direct, LinearAttention, Model, x
from torch import nn

from hnf_attention.instrumentation import instrument


def test_multihead_attention_is_measured_with_and_without_its_weights():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.quiet = nn.MultiheadAttention(16, 4, batch_first=True)
            self.talkative = nn.MultiheadAttention(16, 4, batch_first=True)
            self.idle_attention = LinearAttention()

        def forward(self, inputs):
            out, _ = self.quiet(inputs, inputs, inputs, need_weights=False)
            return self.talkative(out, out, out, need_weights=True)[0]

    model = Two()
    with instrument(model) as handle:
        assert "no forward has run" in str(handle.coverage)
        with pytest.raises(RuntimeError, match="no forward has run"):
            handle.require_measured()
        model(x())
    handle.require_measured()
    assert list(handle.coverage.measured) == ["quiet", "talkative"]
    assert list(handle.coverage.not_measured) == ["idle_attention"]
    text = str(handle.coverage)
    assert "measured (2)" in text and "NOT measured (1)" in text and "talkative" in text


def test_the_projection_after_attention_is_not_listed():
    class LayerAttentionOutput(nn.Linear):
        """Named as in LXMERT."""

    model = nn.Sequential(Attention(), LayerAttentionOutput(16, 16))
    with instrument(model, strict=True) as handle:
        model(x())
    assert list(handle.coverage.measured) == ["0"] and not handle.coverage.not_measured


def test_attention_without_a_softmax_is_listed_even_beside_a_measured_container():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = LinearAttention()

        def forward(self, inputs):
            out = self.inner(inputs)
            return F.scaled_dot_product_attention(out, out, out)

    with instrument(Mixed()) as handle:
        pass
    model = Mixed()
    with instrument(model) as handle:
        model(x())
    assert list(handle.coverage.measured) == [""]
    assert list(handle.coverage.not_measured) == ["inner"]
    assert "or a softmax between two products" in handle.coverage.not_measured["inner"]


def test_strict_raises_once_after_the_first_complete_forward():
    model = nn.Sequential(Attention(), LinearAttention())
    with instrument(model, strict=True) as handle:
        handle.measuring = False
        model(x())  # says nothing about coverage
        handle.measuring = True
        with pytest.raises(RuntimeError, match="Linear|scaled_dot_product_attention"):
            model(x())
        model(x())
    with instrument(Model(), strict=True) as handle:
        pass
    good = Model()
    with instrument(good, strict=True):
        good(x())
    assert not model._forward_hooks and not good._forward_hooks


def test_strict_raises_where_nothing_is_measured_and_nothing_is_named_like_attention():
    model = nn.Sequential(nn.Linear(16, 16))
    with instrument(model, strict=True), pytest.raises(RuntimeError, match="nothing measured"):
        model(x())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_that_cannot_be_measured_are_passed_on_and_listed():
    model = Direct()
    parts = [torch.randn(3, 2, 8), torch.randn(5, 2, 8)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    plain = model(nested, nested, nested)
    with instrument(model, mode="fused") as handle:
        output = model(nested, nested, nested)
        assert "NestedTensor" in handle.coverage.not_measured[""]
        meta = torch.empty(1, 2, 3, 4, device="meta")
        assert model(meta, meta, meta).is_meta
        assert "meta" in handle.coverage.not_measured[""]
        q = torch.randn(1, 2, 3, 4)
        model(q, q, q)
        assert handle.coverage.measured[""].startswith("fused")
    torch.testing.assert_close(output.values(), plain.values(), rtol=0, atol=0)
