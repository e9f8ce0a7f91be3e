"""Every action on real attention layers: what it does to the scores, what it refuses, and the way back."""

import copy
import json
import math
import pickle

import pytest
import torch
import transformers
from heads import head_stats, snapshot
from torch import nn

from hnf_attention import apply_intervention, instrument
from hnf_attention.diagnosis import diagnose
from hnf_attention.interventions import Adviser, Intervention
from hnf_attention.interventions import intervention as make

TAU = 30.0
SIZES = dict(vocab_size=40, num_hidden_layers=1, hidden_size=32, num_attention_heads=4, intermediate_size=16)
TOKENS = torch.randint(0, 40, (2, 20), generator=torch.Generator().manual_seed(0))


class PlainBlock(nn.Module):
    """Attention written by a user, with one fused projection as timm and nanoGPT have it."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(32, 96))

    def forward(self, x):
        q, k, v = getattr(self, self.name)(x).view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v)


class Outer(nn.Module):
    """Projections in one module, the attention call in a module inside of it."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(32, 32), nn.Linear(32, 16)
        self.inner = Inner()

    def forward(self, x):
        q, k = (p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (self.q_proj, self.k_proj))
        return self.inner(q, k)


class Inner(nn.Module):
    def forward(self, q, k):
        return nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)


class Multihead(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True, **options)

    def forward(self, x):
        other = x[..., : self.attention.kdim]
        return self.attention(x, other, other, need_weights=False)[0]


def hugging_face(config, model_class, **forward):
    def build():
        model = model_class(config)
        return model, lambda: model(TOKENS, **forward)

    return build


def plain(make_module):
    def build():
        model = nn.Sequential(nn.Embedding(40, 32), make_module())
        return model, lambda: model(TOKENS)

    return build


t = transformers
GPT2 = t.GPT2Config(vocab_size=40, n_layer=1, n_embd=32, n_head=4, n_positions=32)
LLAMA = t.LlamaConfig(**SIZES, num_key_value_heads=2)
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


@pytest.fixture(params=BUILDERS)
def hot(request):
    """A model whose four heads have scores far apart, two of them above TAU: (model, run, layer, scores)."""
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
        None, make.temperature({layer: (scores / torch.tensor([90.0, 5, 40, 20])).tolist()}, ""), model
    )
    _, scores = largest(model, run)
    torch.testing.assert_close(scores, torch.tensor([90.0, 5, 40, 20]), rtol=1e-4, atol=0)
    return model, run, layer, scores


def weights(model):
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_qk_clip_brings_exactly_the_hot_heads_to_the_threshold(hot):
    model, run, layer, scores = hot
    before = weights(model)
    applied = apply_intervention(None, make.qk_clip(TAU, {layer: scores.tolist()}, "hot"), model)
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
    apply_intervention(None, make.qk_clip(TAU, {layer: scores.tolist()}, "hot"), model)
    _, after = measure(model, run)
    factor = (TAU / scores).clamp(max=1)
    grouped = any(word in request.node.callspec.id for word in ("grouped", "around"))
    query, key = (factor, torch.ones(4)) if grouped else (factor.sqrt(), factor.sqrt())
    torch.testing.assert_close(after.query_norm / before.query_norm, query, rtol=1e-4, atol=0)
    torch.testing.assert_close(after.key_norm / before.key_norm, key, rtol=1e-4, atol=0)


def test_qk_clip_leaves_heads_alone_that_need_nothing(hot):
    model, run, layer, scores = hot
    before = weights(model)
    for sizes in ([TAU] * 4, [None, math.nan, math.inf, 1.0]):
        applied = apply_intervention(None, make.qk_clip(TAU, {layer: sizes}, ""), model)
        assert "nothing to scale" in applied.description
        assert not changed(before, weights(model))


def test_temperature_divides_exactly_the_chosen_heads(hot):
    model, run, layer, scores = hot
    applied = apply_intervention(None, make.temperature({layer: [8.0, 1.0, 1.0, 0.5]}, "sharp"), model)
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
    apply_intervention(None, make.temperature({"model.layers.0.self_attn": [4.0] * 4}, ""), model)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, other(TOKENS).logits, rtol=1e-5, atol=1e-6)


def test_scaling_bf16_weights_rounds_once():
    torch.manual_seed(0)
    model = t.LlamaForCausalLM(LLAMA).bfloat16()
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    apply_intervention(None, make.temperature({"model.layers.0.self_attn": [3.0] * 4}, ""), model)
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
        clip = make.qk_clip(0.01, {"transformer.h.0.attn": [0.02, 0.03, 0.005, 0.04]}, "", lr_factor=0.5)
        apply_intervention(optimizer, clip, model)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 / 8)
    assert all(p.grad.isfinite().all() for p in model.parameters())


# Layouts that cannot be scaled


class Strange(nn.Module):
    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


Attn = type("GPTBigCodeAttention", (Strange,), {})


@pytest.mark.parametrize(
    "module, message",
    [
        (Strange(q_proj=nn.Linear(8, 8), k_proj=nn.Linear(8, 8), q_norm=nn.LayerNorm(4)), "QK-norm .*q_norm"),
        (Strange(query=nn.Linear(8, 8), key=nn.Linear(8, 8), key_layernorm=nn.LayerNorm(4)), "QK-norm"),
        (Strange(query_key_value=nn.Linear(8, 24)), "class whose row order is known"),
        (Attn(c_attn=nn.Linear(8, 24)), "another order, that of GPTBigCodeAttention"),
        (
            Strange(q_proj=nn.Conv1d(8, 8, 1), k_proj=nn.Linear(8, 8)),
            "linear layer with its own .*got Conv1d",
        ),
        (Strange(q_proj=nn.Linear(8, 9), k_proj=nn.Linear(8, 8)), "divide by 2 heads, got 9"),
        (
            Strange(q_proj=nn.Linear(8, 8), k_proj=nn.Linear(8, 6)),
            "2 query heads of 4 .* got .* 8 .* 6 outputs",
        ),
        (Strange(qkv=nn.Linear(8, 20)), "divide by 6 heads, got 20"),
        (Strange(proj=nn.Linear(8, 8)), "known layout .* got Strange with \\['proj'\\]"),
    ],
)
@pytest.mark.parametrize("action", ["qk_clip", "temperature"])
def test_layouts_that_are_refused(module, message, action):
    model = nn.ModuleDict({"attn": module})
    before = weights(model)
    numbers = {"attn": [100.0, 100.0]}
    wanted = make.qk_clip(TAU, numbers, "") if action == "qk_clip" else make.temperature(numbers, "")
    with pytest.raises(ValueError, match=message):
        apply_intervention(None, wanted, model)
    assert not changed(before, weights(model))


def test_a_parametrized_projection_is_refused():
    module = Strange(q_proj=nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), k_proj=nn.Linear(8, 8))
    with pytest.raises(ValueError, match="its own floating-point weight"):
        apply_intervention(None, make.temperature({"a": [2.0, 2.0]}, ""), nn.ModuleDict({"a": module}))


def test_qwen3_is_refused_as_a_whole():
    model = t.Qwen3ForCausalLM(t.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8))
    with pytest.raises(ValueError, match="QK-norm .*q_norm, k_norm.*lower its gains or the learning rate"):
        apply_intervention(None, make.qk_clip(TAU, {"model.layers.0.self_attn": [99.0] * 4}, ""), model)


def test_an_identity_in_place_of_a_norm_is_no_qk_norm():
    module = Strange(qkv=nn.Linear(8, 24), q_norm=nn.Identity(), norm=nn.LayerNorm(8))
    apply_intervention(None, make.temperature({"a": [2.0, 2.0]}, ""), nn.ModuleDict({"a": module}))


def test_all_layers_or_none():
    model = nn.ModuleDict({"good": PlainBlock("qkv"), "bad": Strange(proj=nn.Linear(8, 8))})
    before = weights(model)
    with pytest.raises(ValueError, match="known layout"):
        apply_intervention(None, make.qk_clip(TAU, {"good": [99.0] * 4, "bad": [99.0] * 4}, ""), model)
    assert not changed(before, weights(model))


# Learning rates


def test_reduce_lr_multiplies_every_group_and_reverts():
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD(
        [{"params": [parameters[0]], "lr": 0.1}, {"params": [parameters[1]], "lr": 0.02}]
    )
    applied = apply_intervention(optimizer, {"action": "reduce_lr", "factor": 0.5, "reason": "because"})
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.01]
    assert "(0.1, 0.02) times 0.5" in applied.description
    applied.revert()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.1, 0.02])


@pytest.mark.parametrize("kind", ["lambda", "sequential", "cosine"])
def test_schedulers_keep_the_reduced_rate(kind, caplog):
    def rates(factor_at):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        s = torch.optim.lr_scheduler
        scheduler = {
            "lambda": lambda: s.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
            "sequential": lambda: s.SequentialLR(
                optimizer,
                [s.ConstantLR(optimizer, 0.5, 2), s.LambdaLR(optimizer, lambda step: 0.9**step)],
                [3],
            ),
            "cosine": lambda: s.CosineAnnealingLR(optimizer, 20),
        }[kind]()
        seen = []
        for step in range(8):
            if step == factor_at:
                apply_intervention(optimizer, make.reduce_lr(0.25, ""), scheduler=scheduler)
            optimizer.step()
            scheduler.step()
            seen.append(optimizer.param_groups[0]["lr"])
        return torch.tensor(seen)

    plain, reduced = rates(None), rates(2)
    torch.testing.assert_close(reduced[:2], plain[:2])
    torch.testing.assert_close(reduced[2:], 0.25 * plain[2:])
    assert not caplog.records


def test_a_scheduler_that_is_not_given_is_mentioned(caplog):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    apply_intervention(optimizer, make.reduce_lr(0.5, ""))
    assert optimizer.param_groups[0]["initial_lr"] == 0.5
    assert "scheduler=" in caplog.text


def test_a_tensor_rate_stays_the_same_tensor():
    rate = torch.tensor(1.0)
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=rate)
    apply_intervention(optimizer, make.reduce_lr(0.5, ""))
    assert optimizer.param_groups[0]["lr"] is rate and rate == 0.5


# Dropout


@pytest.mark.parametrize(
    "build, layer, read",
    [
        (lambda: t.GPT2LMHeadModel(GPT2), "transformer.h.0.attn", lambda m: m.attn_dropout.p),
        (lambda: t.BertModel(t.BertConfig(**SIZES)), "encoder.layer.0.attention.self", lambda m: m.dropout.p),
        (lambda: t.LlamaForCausalLM(LLAMA), "model.layers.0.self_attn", lambda m: m.attention_dropout),
        (lambda: Multihead(dropout=0.1), "attention", lambda m: m.dropout),
    ],
)
def test_increase_dropout(build, layer, read):
    model = build()
    module = model.get_submodule(layer)
    before = read(module)
    others = {
        n: m.p for n, m in model.named_modules() if isinstance(m, nn.Dropout) and not n.startswith(layer)
    }
    applied = apply_intervention(None, {"action": "increase_dropout", "layer": layer, "reason": "r"}, model)
    assert read(module) == pytest.approx(before + 0.1)
    assert f"{before:g} -> {before + 0.1:g}" in applied.description
    after = {
        n: m.p for n, m in model.named_modules() if isinstance(m, nn.Dropout) and not n.startswith(layer)
    }
    assert others == after
    if hasattr(module, "resid_dropout"):
        assert module.resid_dropout.p == GPT2.resid_pdrop
    applied.revert()
    assert read(module) == before


def test_dropout_is_raised_in_the_forward_pass_and_bounded():
    torch.manual_seed(0)
    model = t.GPT2Model(
        t.GPT2Config(**{**GPT2.to_dict(), "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0})
    )
    model.train()

    def differs():
        return not torch.equal(model(TOKENS)[0], model(TOKENS)[0])

    assert not differs()
    wanted = {"action": "increase_dropout", "layer": "h.0.attn", "amount": 0.4, "reason": ""}
    apply_intervention(None, wanted, model)
    assert differs()
    for _ in range(3):
        apply_intervention(None, wanted, model)
    assert model.h[0].attn.attn_dropout.p == 0.5


def test_dropout_of_a_layer_without_any():
    model = nn.ModuleDict({"attn": PlainBlock("qkv")})
    with pytest.raises(ValueError, match="'attn' to have an attention dropout .*got PlainBlock with none"):
        apply_intervention(None, make.increase_dropout("attn", ""), model)


# Bad interventions


CLIP = {"action": "qk_clip", "threshold": 30.0, "layers": {"qkv": [1.0]}, "reason": ""}


@pytest.mark.parametrize(
    "wanted, message",
    [
        ({"action": "pray"}, "expected intervention\\['action'\\] in .*got 'pray'"),
        ({}, "got None"),
        ({"action": "reduce_lr"}, "'factor' to be a number > 0, got None"),
        ({"action": "reduce_lr", "factor": 0.0}, "'factor' to be a number > 0, got 0.0"),
        ({"action": "reduce_lr", "factor": math.nan}, "got nan"),
        ({**CLIP, "threshold": -1}, "'threshold' to be a number > 0, got -1"),
        ({**CLIP, "layers": {}}, "'layers' to map layer names"),
        ({**CLIP, "layers": {"qkv": 3.0}}, "one number per head for layer 'qkv', got 3.0"),
        ({**CLIP, "layers": {"nowhere": [1.0]}}, "name of a module of the model, got 'nowhere'"),
        ({**CLIP, "lr_factor": 2.0}, "an optimizer for qk_clip"),
        (
            {"action": "temperature", "layers": {"attn": [0.0, 1, 1, 1]}},
            "factors of 'attn' to be a number > 0",
        ),
        ({"action": "increase_dropout"}, "'layer' to name a module of the model, got None"),
        ({"action": "increase_dropout", "layer": "x"}, "got 'x'"),
    ],
)
def test_bad_interventions(wanted, message):
    model = nn.ModuleDict({"attn": PlainBlock("qkv")})
    optimizer = None if "lr_factor" in wanted else torch.optim.SGD(model.parameters(), lr=0.1)
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        apply_intervention(optimizer, wanted, model)
    assert not changed(before, weights(model))


@pytest.mark.parametrize("wanted", [CLIP, {"action": "increase_dropout", "layer": "a"}])
def test_a_missing_model(wanted):
    with pytest.raises(ValueError, match=f"expected a model for {wanted['action']}, got None"):
        apply_intervention(None, wanted)


def test_a_missing_optimizer():
    with pytest.raises(ValueError, match="expected an optimizer for reduce_lr"):
        apply_intervention(None, make.reduce_lr(0.5, ""))


def test_an_intervention_is_a_dict_that_knows_its_model():
    model = nn.ModuleDict({"attn": PlainBlock("qkv")})
    wanted = Intervention({"action": "temperature", "layers": {"attn": [2.0] * 4}, "reason": ""}, model)
    before = weights(model)
    assert json.loads(json.dumps(wanted)) == wanted == dict(wanted)
    assert pickle.loads(pickle.dumps(wanted)) == wanted and copy.deepcopy(wanted).model is None
    apply_intervention(None, wanted)
    assert changed(before, weights(model)) == {"attn.qkv.weight", "attn.qkv.bias"}


# Which fix for which findings


@pytest.fixture
def model():
    return nn.ModuleDict(
        {
            "a": PlainBlock("qkv"),
            "b": PlainBlock("qkv"),
            "normed": Strange(qkv=nn.Linear(32, 96), q_norm=nn.LayerNorm(8)),
        }
    )


def growing(**layers):
    """Ten readings in which the largest score of each named layer rises to the given value."""
    return [
        snapshot(
            step, **{name: {"max_logit": 5 + (top - 5) * (step / 10) ** 2} for name, top in layers.items()}
        )
        for step in range(1, 11)
    ]


def proposal(model, history):
    return Adviser(model).propose(diagnose(history))


def test_nothing_for_a_healthy_model(model):
    assert proposal(model, growing(a=5.0, b=6.0)) is None


def test_an_alarm_is_clipped_and_slowed(model):
    wanted = proposal(model, growing(a=2000.0, b=5.0))
    assert wanted["action"] == "qk_clip" and wanted["threshold"] == 30.0 and wanted["lr_factor"] == 0.5
    assert wanted["layers"] == {"a": [2000.0] * 4} and wanted.model is model
    assert "head 0 of a" in wanted["reason"]


def test_growth_below_the_alarm_is_clipped_only(model):
    history = [snapshot(s, a={"max_logit": 50.0 + s}) for s in range(1, 11)]  # slow
    assert proposal(model, history) is None
    history = [snapshot(10 * s, a={"max_logit": (4 + 0.5 * s) ** 2}) for s in range(1, 11)]
    wanted = proposal(model, history)
    assert wanted["action"] == "qk_clip" and "lr_factor" not in wanted


def test_large_scores_that_do_not_rise_are_left_alone(model):
    assert diagnose([snapshot(s, a={"max_logit": 90.0}) for s in range(1, 11)]).has_issues()
    assert proposal(model, [snapshot(s, a={"max_logit": 90.0}) for s in range(1, 11)]) is None


def test_a_collapse_is_acted_on(model):
    collapsed = {"entropy_ratio": 0.01, "dead_share": 0.95, "max_weight": 0.9}
    wanted = proposal(model, [snapshot(1, a=collapsed | {"max_logit": 50.0})])
    assert (
        wanted["action"] == "qk_clip" and wanted["layers"] == {"a": [50.0] * 4} and "lr_factor" not in wanted
    )
    wanted = proposal(model, [snapshot(1, a=collapsed | {"max_logit": 20.0}, b={})])
    assert wanted["action"] == "temperature" and wanted["layers"] == {"a": [8.0] * 4}


def test_one_sharp_head_of_a_healthy_model_is_left_alone(model):
    sharp = head_stats(entropy_ratio=[0.03, 0.7, 0.7, 0.7], max_logit=[86.0, 5, 5, 5])
    history = [snapshot(s, a=sharp) for s in range(1, 6)]
    assert diagnose(history).has_issues() and proposal(model, history) is None


def test_spikes_of_a_layer_without_growth_get_dropout():
    layer = t.BertModel(t.BertConfig(**SIZES))
    name = "encoder.layer.0.attention.self"
    spiked = head_stats(max_weight=[0.97, 0.98, 0.2, 0.2])
    history = [snapshot(1, **{name: spiked})]
    wanted = proposal(layer, history)
    assert wanted["action"] == "increase_dropout" and wanted["layer"] == name
    assert proposal(nn.ModuleDict({"a": PlainBlock("qkv")}), [snapshot(1, a=spiked)]) is None
    assert proposal(layer, [snapshot(1, **{name: head_stats(max_weight=[0.97, 0.2, 0.2, 0.2])})]) is None


def test_non_finite_numbers_get_a_lower_rate_and_advice(model):
    wanted = proposal(model, [snapshot(1, a={"nonfinite_rows": 3, "max_logit": 5000.0})])
    assert wanted["action"] == "reduce_lr" and wanted["factor"] == 0.5
    assert "restore the last checkpoint" in wanted["reason"]


def test_layers_that_cannot_be_clipped_leave_the_learning_rate(model):
    wanted = proposal(model, growing(normed=2000.0, a=5.0))
    assert wanted["action"] == "reduce_lr" and "weights that can be clipped" in wanted["reason"]
    both = proposal(model, growing(normed=2000.0, a=50.0))
    assert both["action"] == "qk_clip" and list(both["layers"]) == ["a"]
    apply_intervention(torch.optim.SGD(model.parameters(), lr=0.1), both)


def test_a_clip_is_repeated_but_the_rate_is_cut_once_per_window(model):
    adviser = Adviser(model)
    history = growing(a=2000.0)
    first = adviser.propose(diagnose(history))
    assert adviser.propose(diagnose(history)) == first  # asked twice, answered the same
    cuts = []
    for step in range(11, 32):
        history.append(snapshot(step, a={"max_logit": 2000.0 + 200 * step}))
        wanted = adviser.propose(diagnose(history))
        assert wanted["action"] == "qk_clip"
        if "lr_factor" in wanted:
            cuts.append(step)
    assert cuts == [20, 30]


def test_once_clipping_every_reading_above_the_threshold_is_clipped(model):
    adviser = Adviser(model)
    history = growing(a=2000.0)
    adviser.propose(diagnose(history))
    history.append(snapshot(11, a={"max_logit": 31.0}, b={"max_logit": 29.0}))
    diagnosis = diagnose(history)
    assert not diagnosis.has_issues()
    wanted = adviser.propose(diagnosis)
    assert wanted["layers"] == {"a": [31.0] * 4} and "lr_factor" not in wanted
    history.append(snapshot(12, a={"max_logit": 30.0}))
    assert adviser.propose(diagnose(history)) is None


def test_layers_that_are_no_modules_are_not_proposed(model):
    history = growing(a=2000.0)
    extra = {f"a [{n} heads of 8, float32]": s.layers["a"] for n, s in enumerate(history)}
    history[-1].layers.update(extra)
    assert list(proposal(model, history)["layers"]) == ["a"]
