"""Changes of a layer's attention call: soft-cap, precision, pruned heads, and penalties for the loss."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from attention_layers import LLAMA, TOKENS, Multihead, changed, weights
from leftovers import leave_nothing_behind  # noqa: F401
from odd_layers import Fused, Separate
from torch import nn

from hnf_attention import AttentionStabilityMonitor, apply_intervention
from hnf_attention.interventions import AttentionPenalty, dropout, loss_change, plan_intervention

X = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def scores_and_values(module, x):
    q, k, v = module.parts(x)
    return q @ k.transpose(-1, -2) * 8**-0.5, v


def test_a_softcap_is_the_formula_and_is_measured():
    model = nn.Sequential(Fused(is_causal=True))
    with torch.no_grad():
        model[0].qkv.weight.mul_(10)
    before = model(X)
    with AttentionStabilityMonitor(model, log_every=1) as monitor:
        applied = apply_intervention(None, {"action": "softcap", "layers": ["0"], "cap": 7.0}, model)
        out = model(X)
        scores, values = scores_and_values(model[0], X)
        hidden = torch.ones(20, 20, dtype=torch.bool).triu(1)
        weights_ = (7 * torch.tanh(scores / 7)).masked_fill(hidden, -torch.inf).softmax(-1)
        expected = model[0].proj((weights_ @ values).transpose(1, 2).flatten(2))
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        out.sum().backward()
        assert model[0].qkv.weight.grad.isfinite().all()
        (verdict,) = applied.verify(monitor.on_step().stats)
        assert verdict.holds and "the cap is 7" in verdict.text
    applied.revert()
    assert torch.equal(model(X), before)


def test_a_softcap_of_grouped_keys_in_transformers():
    model = transformers.LlamaForCausalLM(LLAMA).train()
    before = model(TOKENS).logits
    layer = "model.layers.0.self_attn"
    applied = apply_intervention(None, {"action": "softcap", "layers": [layer], "cap": 1e4}, model)
    torch.testing.assert_close(model(TOKENS).logits, before, rtol=1e-4, atol=1e-5)
    applied.revert()
    assert torch.equal(model(TOKENS).logits, before)
    eager = transformers.LlamaForCausalLM._from_config(copy.deepcopy(LLAMA), attn_implementation="eager")
    apply_intervention(None, {"action": "softcap", "layers": [layer]}, eager)
    with pytest.raises(RuntimeError, match="to call scaled_dot_product_attention for a soft-cap"):
        eager(TOKENS)


def test_precision_saves_fp16_scores_from_overflow():
    model = nn.Sequential(Fused()).bfloat16()
    before = model(X.bfloat16())
    seen = []
    applied = apply_intervention(None, {"action": "precision", "layers": ["0"]}, model)
    original = F.scaled_dot_product_attention
    with AttentionStabilityMonitor(model, log_every=1) as monitor:
        out = model(X.bfloat16())
        out.float().sum().backward()
        stats = monitor.on_step().stats
    assert out.dtype == torch.bfloat16 and not seen and F.scaled_dot_product_attention is original
    assert applied.verify(stats)[0].holds and applied.verify({})[0].holds is None
    torch.testing.assert_close(out, before, rtol=2e-2, atol=2e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.float()(X).dtype == torch.bfloat16
    applied.revert()


def test_pruned_heads_give_nothing_and_the_loss_says_what_it_costs():
    model = nn.Sequential(Separate(groups=2))
    model[0].proj.bias.data.zero_()
    wanted = {"action": "prune_heads", "layers": {"0": [1, 3]}}
    (action,) = plan_intervention(None, wanted, model)
    loss = lambda: model(X).square().mean()  # noqa: E731
    old, before = weights(model), float(loss().detach())
    cost = loss_change(action, loss)
    assert not action.applied and not changed(old, weights(model))
    applied = apply_intervention(None, wanted, model)
    assert float(loss().detach()) == pytest.approx(before + cost) and cost != 0
    loss().backward()
    assert (model[0].proj.weight.grad[:, 8:16] == 0).all() and (model[0].proj.weight.grad[:, :8] != 0).any()
    assert applied.description == "prune_heads: switches off 0 heads [1, 3]"
    applied.revert()
    assert float(loss().detach()) == before
    apply_intervention(None, {"action": "prune_heads", "layers": {"0": [9]}}, model)
    with pytest.raises(RuntimeError, match="heads below 4 to prune, got .9."):
        model(X)


def test_changes_of_one_layer_are_made_together_and_copies_keep_them():
    model = nn.Sequential(Fused())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain = model(X)
    first = apply_intervention(optimizer, {"action": "qk_norm"}, model)
    model(X)
    both = apply_intervention(optimizer, {"action": "prune_heads", "layers": {"0": [0]}}, model)
    out = model(X)
    assert torch.equal(copy.deepcopy(model)(X), out)
    both.revert()
    assert not torch.equal(model(X), out)
    first.revert()
    assert torch.equal(model(X), plain)


@pytest.mark.parametrize("build", [lambda: Fused(is_causal=True), lambda: Separate(groups=2), Multihead])
def test_a_penalty_is_the_formula_and_its_gradient_too(build):
    model = nn.Sequential(build())
    name = "0" if not isinstance(model[0], Multihead) else "0.attention"
    seen = []

    def written(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **_):
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        if is_causal:
            scores = scores.masked_fill(torch.ones(20, 20, dtype=torch.bool).triu(1), -torch.inf)
        log = scores.log_softmax(-1)
        p = log.exp()
        entropy = -(p * log.masked_fill(p == 0, 0)).sum(-1)
        visible = (scores > -torch.inf).sum(-1)
        seen.append(0.3 * scores.logsumexp(-1).square().mean() + 0.7 * (visible.log() - entropy).mean())
        return p @ value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", written)
        model(X)
    seen[0].backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    plain = model(X)
    penalty = AttentionPenalty(model, [name], z_loss=0.3, entropy=0.7)
    assert torch.equal(model(X), plain)
    loss = penalty.loss()
    torch.testing.assert_close(loss, seen[0], rtol=1e-4, atol=1e-6)
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert {n for n, g in expected.items() if g.abs().max() > 0} <= set(found)
    for n, gradient in found.items():
        torch.testing.assert_close(gradient, expected[n], rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        model(X)
    with pytest.raises(RuntimeError, match=r"a training forward of the model before loss\(\), got none"):
        penalty.loss()
    penalty.remove()
    penalty.remove()
    assert torch.equal(model(X), plain)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            {"action": "softcap", "layers": "0"},
            "'layers' to be a list of names of modules of the model, got '0'",
        ),
        ({"action": "softcap", "layers": ["9"]}, "got .'9'"),
        ({"action": "softcap", "layers": ["0"], "cap": 0}, "'cap' to be a number > 0, got 0"),
        ({"action": "precision"}, "list of names of modules of the model, got None"),
        ({"action": "prune_heads", "layers": ["0"]}, "to map layer names to numbers of heads"),
        ({"action": "prune_heads", "layers": {"0": []}}, "numbers of heads of layer '0'"),
        ({"action": "prune_heads", "layers": {"0": [-1]}}, "numbers of heads of layer '0', got .-1."),
    ],
)
def test_wrong_items(wanted, message):
    model = nn.Sequential(Fused())
    with pytest.raises(ValueError, match=message):
        apply_intervention(None, wanted, model)
    with pytest.raises(ValueError, match="z_loss or entropy to be a weight > 0, got None for both"):
        AttentionPenalty(model, ["0"])


def test_a_softcap_needs_attention_without_dropout():
    model = nn.Sequential(Multihead(dropout=0.1)).train()
    layer = "0.attention"
    softcap = {"action": "softcap", "layers": [layer]}
    with pytest.raises(
        ValueError, match="to have no attention dropout for a soft-cap, got dropout 0.1 of its"
    ):
        apply_intervention(None, softcap, model)
    model(X)
    model[0].attention.dropout = 0.0
    raised = {"action": "increase_dropout", "layer": layer}
    with pytest.raises(ValueError, match="free of a soft-cap, which knows no dropout"):
        apply_intervention(None, {**softcap, "then": [raised]}, model)
    with pytest.raises(ValueError, match="to have no attention dropout for a soft-cap"):
        apply_intervention(None, {**raised, "then": [softcap]}, model)
    assert model[0].attention.dropout == 0.0 and dropout.raisable(model, layer)
    applied = apply_intervention(None, softcap, model)
    model(X)
    assert not dropout.raisable(model, layer)
    applied.revert()
    assert dropout.raisable(model, layer)


def test_a_softcap_finds_dropout_that_no_attribute_names_in_the_forward():
    model = nn.Sequential(Multihead()).train()
    apply_intervention(None, {"action": "softcap", "layers": ["0.attention"]}, model)
    model[0].attention.dropout = 0.1
    with pytest.raises(RuntimeError, match="attention without dropout for a soft-cap"):
        model(X)
