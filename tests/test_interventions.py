"""QK-clip and temperature on real attention layers: the scores after, the layouts refused, the way back."""

import copy
import math

import pytest
import torch
import transformers
from attention_layers import (
    GPT2,
    LLAMA,
    SIZES,
    TOKENS,
    Multihead,
    Outer,
    PlainBlock,
    Strange,
    changed,
    hugging_face,
    plain,
    weights,
)
from torch import nn

from hnf_attention import apply_intervention, instrument
from hnf_attention.interventions import qk_clip, temperature

TAU = 30.0
t = transformers
BUILDERS = {
    "gpt2, fused Conv1D": hugging_face(GPT2, t.GPT2LMHeadModel),
    "llama, grouped keys": hugging_face(LLAMA, t.LlamaForCausalLM),
    "llama, as many keys": hugging_face(t.LlamaConfig(**SIZES), t.LlamaForCausalLM),
    "phi3, fused and grouped": hugging_face(
        t.Phi3Config(**SIZES, num_key_value_heads=2, pad_token_id=0), t.Phi3ForCausalLM
    ),
    "bert, biases": hugging_face(t.BertConfig(**SIZES), t.BertModel),
    "distilbert": hugging_face(
        t.DistilBertConfig(vocab_size=40, dim=32, n_heads=4, n_layers=1, hidden_dim=16), t.DistilBertModel
    ),
    "gpt-neox, by head": hugging_face(t.GPTNeoXConfig(**SIZES), t.GPTNeoXForCausalLM),
    "multihead": plain(Multihead),
    "multihead, biases": plain(lambda: Multihead(add_bias_kv=True)),
    "multihead, other key width": plain(lambda: Multihead(kdim=16, vdim=16)),
    "user's qkv": plain(lambda: PlainBlock("qkv")),
    "user's c_attn": plain(lambda: PlainBlock("c_attn")),
    "projections around the call": plain(Outer),
}


def measure(model, run):
    """(layer name, Measurement) of the one attention layer."""
    with instrument(model, mode="probe") as instrumentation, torch.no_grad():
        run()
    ((layer, measured),) = instrumentation.latest.items()
    return layer, measured


def largest(model, run):
    """(layer name, largest |score| of each head)."""
    layer, measured = measure(model, run)
    rows = measured.rows
    return layer, torch.maximum(rows.max_logit.abs(), rows.min_logit.abs()).amax((0, 2))


@pytest.fixture(scope="module", params=BUILDERS)
def made(request):
    """`hot`, and the weights that it starts with."""
    torch.manual_seed(0)
    model, run = BUILDERS[request.param]()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)  # they start at zero: forgetting them would go unnoticed
    layer, scores = largest(model, run)
    apply_intervention(
        None, temperature.propose({layer: (scores / torch.tensor([90.0, 5, 40, 20])).tolist()}, ""), model
    )
    _, scores = largest(model, run)
    torch.testing.assert_close(scores, torch.tensor([90.0, 5, 40, 20]), rtol=1e-4, atol=0)
    return (model, run, layer, scores), copy.deepcopy(model.state_dict())


@pytest.fixture
def hot(made):
    """A model whose four heads have scores far apart, two of them above TAU: (model, run, layer, scores)."""
    (model, *rest), start = made
    model.load_state_dict(start)
    return model, *rest


def test_qk_clip_brings_exactly_the_hot_heads_to_the_threshold(hot):
    model, run, layer, scores = hot
    before = weights(model)
    applied = apply_intervention(None, qk_clip.propose(TAU, {layer: scores.tolist()}, "hot"), model)
    _, after = largest(model, run)
    torch.testing.assert_close(after, scores.clamp(max=TAU), rtol=1e-4, atol=0)
    assert f"{layer} heads [0, 2]" in applied.description
    touched = changed(before, weights(model))
    assert touched and all(name.startswith(layer.removesuffix(".inner")) for name in touched)
    applied.revert()
    _, again = largest(model, run)
    torch.testing.assert_close(again, scores, rtol=1e-5, atol=0)
    for name, value in weights(model).items():
        torch.testing.assert_close(value, before[name], rtol=1e-6, atol=0)
    reverted = weights(model)
    applied.revert()
    assert not changed(reverted, weights(model))


def test_qk_clip_is_shared_by_query_and_key_unless_keys_are_shared(hot, request):
    model, run, layer, scores = hot
    _, before = measure(model, run)
    apply_intervention(None, qk_clip.propose(TAU, {layer: scores.tolist()}, "hot"), model)
    _, after = measure(model, run)
    factor = (TAU / scores).clamp(max=1)
    grouped = any(word in request.node.callspec.id for word in ("grouped", "around"))
    query, key = (factor, torch.ones(4)) if grouped else (factor.sqrt(), factor.sqrt())
    for name, expected in (("query_norm", query), ("key_norm", key)):
        ratio = getattr(after, name) / getattr(before, name)
        torch.testing.assert_close(ratio, expected.expand_as(ratio), rtol=1e-4, atol=0)


def test_qk_clip_leaves_heads_alone_that_need_nothing(hot):
    model, run, layer, scores = hot
    before = weights(model)
    for sizes in ([TAU] * 4, [None, math.nan, math.inf, 1.0]):
        applied = apply_intervention(None, qk_clip.propose(TAU, {layer: sizes}, ""), model)
        assert "nothing to scale" in applied.description
        assert not changed(before, weights(model))


def test_temperature_divides_exactly_the_chosen_heads(hot):
    model, run, layer, scores = hot
    applied = apply_intervention(None, temperature.propose({layer: [8.0, 1.0, 1.0, 0.5]}, "sharp"), model)
    expected = scores / torch.tensor([8.0, 1.0, 1.0, 0.5])
    torch.testing.assert_close(largest(model, run)[1], expected, rtol=1e-4, atol=0)
    assert f"{layer} heads [0, 3]" in applied.description
    applied.revert()
    torch.testing.assert_close(largest(model, run)[1], scores, rtol=1e-5, atol=0)


def test_temperature_is_the_temperature():
    torch.manual_seed(0)
    model = t.LlamaForCausalLM(LLAMA).eval()
    other = copy.deepcopy(model)
    other.model.layers[0].self_attn.scaling /= 4
    apply_intervention(None, temperature.propose({"model.layers.0.self_attn": [4.0] * 4}, ""), model)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, other(TOKENS).logits, rtol=1e-5, atol=1e-6)


def test_scaling_bf16_weights_rounds_once():
    torch.manual_seed(0)
    model = t.LlamaForCausalLM(LLAMA).bfloat16()
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    apply_intervention(None, temperature.propose({"model.layers.0.self_attn": [3.0] * 4}, ""), model)
    exact = (before.double() / 3).bfloat16()
    assert (model.model.layers[0].self_attn.q_proj.weight == exact).float().mean() > 0.99


def test_training_goes_on_after_a_clip():
    torch.manual_seed(0)
    model = t.GPT2LMHeadModel(GPT2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        clip = qk_clip.propose(0.01, {"transformer.h.0.attn": [0.02, 0.03, 0.005, 0.04]}, "", lr_factor=0.5)
        apply_intervention(optimizer, clip, model)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 / 8)
    assert all(p.grad.isfinite().all() for p in model.parameters())


# Layouts that cannot be scaled


Attn = type("GPTBigCodeAttention", (Strange,), {})


@pytest.mark.parametrize(
    "module, message",
    [
        (Strange(q_proj=nn.Linear(8, 8), k_proj=nn.Linear(8, 8), q_norm=nn.LayerNorm(4)), "QK-norm .*q_norm"),
        (Strange(query=nn.Linear(8, 8), key=nn.Linear(8, 8), key_layernorm=nn.LayerNorm(4)), "QK-norm"),
        (Strange(query_key_value=nn.Linear(8, 24)), "expected proof"),
        (Attn(c_attn=nn.Linear(8, 24)), "another order, that of GPTBigCodeAttention"),
        (
            Strange(q_proj=nn.Conv1d(8, 8, 1), k_proj=nn.Linear(8, 8)),
            "linear layer with its own .*got torch.nn.modules.conv.Conv1d",
        ),
        (
            Strange(q_proj=nn.Linear(8, 9), k_proj=nn.Linear(8, 8)),
            "9 rows, to have heads of one size, got 2 heads",
        ),
        (
            Strange(q_proj=nn.Linear(8, 8), k_proj=nn.Linear(8, 6)),
            "2 query heads of 4 .* got .* 8 .* 6 outputs",
        ),
        (Strange(qkv=nn.Linear(8, 20)), "20 rows, to have heads of one size, got 6 heads"),
        (Strange(proj=nn.Linear(8, 8)), "known layout .* got Strange with \\['proj'\\]"),
    ],
)
@pytest.mark.parametrize("action", ["qk_clip", "temperature"])
def test_layouts_that_are_refused(module, message, action):
    model = nn.ModuleDict({"attn": module})
    before = weights(model)
    numbers = {"attn": [100.0, 100.0]}
    wanted = qk_clip.propose(TAU, numbers, "") if action == "qk_clip" else temperature.propose(numbers, "")
    with pytest.raises(ValueError, match=message):
        apply_intervention(None, wanted, model)
    assert not changed(before, weights(model))


def test_a_parametrized_projection_is_refused():
    module = Strange(q_proj=nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), k_proj=nn.Linear(8, 8))
    with pytest.raises(ValueError, match="its own floating-point weight"):
        apply_intervention(None, temperature.propose({"a": [2.0, 2.0]}, ""), nn.ModuleDict({"a": module}))


def test_qwen3_is_refused_as_a_whole():
    model = t.Qwen3ForCausalLM(t.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8))
    with pytest.raises(ValueError, match="QK-norm .*q_norm, k_norm.*lower its gains or the learning rate"):
        apply_intervention(None, qk_clip.propose(TAU, {"model.layers.0.self_attn": [99.0] * 4}, ""), model)


def test_an_identity_in_place_of_a_norm_is_no_qk_norm():
    block = PlainBlock("qkv")
    block.q_norm, block.norm = nn.Identity(), nn.LayerNorm(8)
    apply_intervention(None, temperature.propose({"a": [2.0] * 4}, ""), nn.ModuleDict({"a": block}))


def test_all_layers_or_none():
    model = nn.ModuleDict({"good": PlainBlock("qkv"), "bad": Strange(proj=nn.Linear(8, 8))})
    before = weights(model)
    with pytest.raises(ValueError, match="known layout"):
        apply_intervention(None, qk_clip.propose(TAU, {"good": [99.0] * 4, "bad": [99.0] * 4}, ""), model)
    assert not changed(before, weights(model))
