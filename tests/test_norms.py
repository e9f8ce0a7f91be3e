"""The second proof of a layout: lengths at the projections are those at the attention."""

import pytest
import torch
import transformers
from attention_layers import GPT2, LLAMA, changed, weights
from odd_layers import Fused, Gated, Grouped, Latent, Separate, normed, rotated
from torch import nn
from transformers.models.llama import modeling_llama

from hnf_attention import AttentionStabilityMonitor
from hnf_attention.interventions import layout, norms, orders
from hnf_attention.interventions.projections import Reader

X = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_right_order_has_the_same_lengths(dtype):
    torch.manual_seed(0)
    for module in (Fused(), Fused(inside=rotated), Separate(groups=2), Separate()):
        module = module.to(dtype)
        found = orders.candidates(module, 4)[0](Reader("a", changing=True))
        with torch.no_grad():
            parts = lambda: module.parts(X.to(dtype))[:2]  # noqa: B023, E731
            assert norms.contradiction(module, found, parts) is None
            assert norms._projected(found.query[:1], [], {}) is None


@pytest.mark.parametrize(
    ("module", "number", "what"),
    [
        (lambda: Fused("heads, kinds"), 0, "query"),  # taken for all q, all k, all v
        (lambda: Fused(), 1, "query"),  # taken for q, k, v by heads
        (lambda: Fused(inside=normed), 0, "query"),
        (lambda: Fused("kinds backwards"), 0, "query"),
    ],
)
def test_other_orders_and_norms_on_the_way_have_other_lengths(module, number, what):
    torch.manual_seed(0)
    module = module()
    with torch.no_grad():
        module.qkv.weight.mul_(torch.linspace(0.5, 2, 96)[:, None])
    found = orders.candidates(module, 4)[number](Reader("a", changing=True))
    said = norms.contradiction(module, found, lambda: module.parts(X)[:2])
    assert f"head's {what} rows" in said and "differ by" in said


def test_a_factor_of_all_queries_is_allowed_and_what_is_not_seen_proves_nothing():
    torch.manual_seed(0)
    module = Fused(inside=lambda _, q, k: (q * 0.35, k))
    found = orders.candidates(module, 4)[0](Reader("a", changing=True))
    assert norms.contradiction(module, found, lambda: module.parts(X)[:2]) is None
    assert norms.contradiction(module, found, lambda: None) is None
    torch_own = nn.MultiheadAttention(32, 4)  # whose projections are no modules
    found = orders.candidates(torch_own, 4)[0](Reader("a", changing=True))
    assert norms.contradiction(torch_own, found, lambda: (X[:, None], X[:, None])) is None


@pytest.mark.parametrize("build", [Fused, Gated, lambda: Grouped(2), lambda: Latent(latent_queries=True)])
def test_it_takes_part_in_the_search(build, monkeypatch):
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": build()})
    asked = []
    real = norms.contradiction
    monkeypatch.setattr(norms, "contradiction", lambda *given: asked.append(real(*given)) or asked[-1])
    layout.find(model, "a", 4)
    assert asked[-1:] == [None]


def measured(model):
    """The model, after a forward that a monitor has seen: what its layers are called with is known then."""
    with AttentionStabilityMonitor(model, log_every=1) as monitor:
        model(torch.arange(12).view(1, 12))
        monitor.on_step()
    return model


def test_a_class_of_transformers_whose_forward_was_replaced_is_refused(monkeypatch):
    """Its name vouches for the forward that transformers wrote."""
    torch.manual_seed(0)
    name, rotary = "model.layers.0.self_attn", modeling_llama.apply_rotary_pos_emb
    model, other = (measured(transformers.LlamaForCausalLM(LLAMA)) for _ in range(2))
    heads, before = model.config.num_attention_heads, weights(model)
    assert layout.find(model, name, heads).num_heads == heads
    layout.find(measured(transformers.GPT2LMHeadModel(GPT2)), "transformer.h.0.attn", 4)

    def with_norm(q, k, *rest, **named):
        return [nn.functional.normalize(x, dim=-1) for x in rotary(q, k, *rest, **named)]

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", with_norm)
    with pytest.raises(ValueError, match="lengths of a head's query rows at the projection"):
        layout.find(other, name, heads)
    assert not changed(before, weights(model))
