"""Eager attention functions of model files: each is compared with what is measured, once per layer."""

import pytest
import torch
from families import FAMILIES, MAJOR, assert_rows_equal_weights, inputs
from torch import nn

from hnf_attention.instrumentation import instrument


@pytest.mark.parametrize("mode", ["probe", "fused"])
@torch.no_grad()
def test_an_eager_function_that_computes_something_else_is_listed(mode, monkeypatch):
    from transformers.models.gpt2 import modeling_gpt2

    original = modeling_gpt2.eager_attention_forward

    def sharpened(module, query, key, value, attention_mask, **kwargs):
        return original(module, 1.5 * query, key, value, attention_mask, **kwargs)

    monkeypatch.setattr(modeling_gpt2, "eager_attention_forward", sharpened)
    model = FAMILIES["gpt2"].build("eager")
    arguments = inputs(FAMILIES["gpt2"], "left")
    plain = model(**arguments).logits
    with instrument(model, mode=mode) as instrumentation:
        output = model(**arguments).logits
    torch.testing.assert_close(output, plain, rtol=0, atol=0)
    assert not instrumentation.coverage.measured
    reasons = list(instrumentation.coverage.not_measured.values())
    assert len(reasons) == 2 and all("computes something else" in reason for reason in reasons)
    with pytest.raises(RuntimeError, match="computes something else"):
        instrumentation.require_measured()


@torch.no_grad()
def test_the_comparison_with_an_eager_function_waits_for_finite_numbers(monkeypatch):
    from transformers.models.gpt2 import modeling_gpt2

    layer, original = "transformer.h.0.attn", modeling_gpt2.eager_attention_forward

    def sharpened(module, query, key, value, attention_mask, **kwargs):
        return original(module, 1.5 * query, key, value, attention_mask, **kwargs)

    model = FAMILIES["gpt2"].build("eager")
    arguments = inputs(FAMILIES["gpt2"], "none")
    weight = model.get_submodule(layer).c_attn.weight
    kept = weight.clone()
    for function, measured in ((original, True), (sharpened, False)):
        monkeypatch.setattr(modeling_gpt2, "eager_attention_forward", function)
        with instrument(model) as instrumentation:
            weight.fill_(torch.nan)
            model(**arguments)
            assert instrumentation.latest[layer].rows.entropy.isnan().all()
            weight.copy_(kept)
            model(**arguments)
            assert (layer in instrumentation.coverage.measured) == measured


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """As in a model file of somebody's own: a module's dropout, a mask made for a longer cache."""
    weights = query @ key.transpose(-1, -2) * scaling + attention_mask[..., : key.shape[-2]]
    weights = nn.functional.dropout(weights.softmax(-1), p=dropout, training=module.training)
    return (module.dropout(weights) @ value).transpose(1, 2), weights


class OwnAttention(nn.Module):
    """A module outside of transformers that follows its conventions."""

    def __init__(self, **options):
        super().__init__()
        self.dropout = nn.Dropout(0.3)
        self.options = options

    def forward(self, query, **options):
        return eager_attention_forward(
            self, query, query, value=query, scaling=0.5, **options, **self.options
        )


@pytest.mark.parametrize("options", [{}, {"dropout": 0.4}])
@torch.no_grad()
def test_checking_somebodys_own_function_draws_no_random_numbers(options):
    module, query = OwnAttention(**options).train(), torch.randn(2, 3, 9, 8)
    mask = torch.zeros(2, 1, 9, 9)
    torch.manual_seed(7)
    plain, _ = module(query, attention_mask=mask)
    with instrument(module, mode="fused") as instrumentation:
        torch.manual_seed(7)
        output, _ = module(query, attention_mask=mask)
    torch.testing.assert_close(output, plain, rtol=0, atol=0)
    assert instrumentation.coverage.measured == {"": "probe: dropout (transformers eager)"}
    assert module.training and module.dropout.training


@torch.no_grad()
def test_a_model_file_of_somebodys_own():
    module, query = OwnAttention(dropout=0.4).eval(), torch.randn(2, 3, 9, 8)
    mask = torch.full((2, 1, 9, 16), torch.finfo(torch.float32).min).triu(1)
    plain, weights = module(query, attention_mask=mask)
    seen = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, -1, -1)
    with instrument(module, mode="fused") as instrumentation:
        output, _ = module(query, attention_mask=mask)
        assert_rows_equal_weights(instrumentation.latest[""], weights, seen)
        how = "fused" if MAJOR > 4 else "probe: attention weights may be asked for"
        assert instrumentation.coverage.measured == {"": f"{how} (transformers eager)"}
        module(query, attention_mask=mask, head_mask=torch.ones(3))
        assert instrumentation.coverage.not_measured == {"": "a head_mask was given"}
    torch.testing.assert_close(output, plain)


@torch.no_grad()
def test_a_layer_that_was_measured_is_listed_once_a_transform_runs_it():
    module, query = OwnAttention().eval(), torch.randn(2, 3, 9, 8)
    mask = torch.zeros(2, 1, 9, 9)
    with instrument(module) as instrumentation:
        plain, _ = module(query, attention_mask=mask)
        assert list(instrumentation.coverage.measured) == [""] and not instrumentation.coverage.not_measured
        output, _ = torch.func.vmap(lambda x: module(x, attention_mask=mask))(query[None])
    torch.testing.assert_close(output[0], plain)
    assert instrumentation.coverage.not_measured == {"": "it runs inside a transform of torch.func"}
