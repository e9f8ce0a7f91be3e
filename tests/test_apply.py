"""Learning rates, dropout, and what apply_intervention refuses."""

import copy
import json
import math
import pickle

import pytest
import torch
import transformers
from attention_layers import GPT2, LLAMA, SIZES, TOKENS, Multihead, PlainBlock, changed, weights
from torch import nn

from hnf_attention import apply_intervention
from hnf_attention.interventions import Applied, Intervention, dropout, items, layout, learning_rate, qk_clip
from hnf_attention.interventions.apply import ACTIONS
from hnf_attention.interventions.projections import Projections

t = transformers

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


@pytest.mark.parametrize("kind", ["lambda", "sequential", "cosine", "wrapped", "listed"])
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
        }.get(kind, lambda: s.LambdaLR(optimizer, lambda step: 1 / (1 + step)))()
        given = [scheduler] if kind == "listed" else scheduler
        if kind == "wrapped":
            given = pytest.importorskip("accelerate.scheduler").AcceleratedScheduler(scheduler, optimizer)
        seen = []
        for step in range(8):
            if step == factor_at:
                apply_intervention(optimizer, learning_rate.propose(0.25, ""), scheduler=given)
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
    apply_intervention(optimizer, learning_rate.propose(0.5, ""))
    assert optimizer.param_groups[0]["initial_lr"] == 0.5
    assert "scheduler=" in caplog.text


def test_a_tensor_rate_stays_the_same_tensor():
    rate = torch.tensor(1.0)
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=rate)
    apply_intervention(optimizer, learning_rate.propose(0.5, ""))
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
        apply_intervention(None, dropout.propose("attn", ""), model)


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
        ({**CLIP, "lr_factor": 0.5}, "an optimizer for qk_clip"),
        ({**CLIP, "lr_factor": 2.0}, "'lr_factor' to be above 0 and at most 1, got 2.0"),
        ({"action": "reduce_lr", "factor": 2.0}, "'factor' to be above 0 and at most 1, got 2.0"),
        ({"action": "reduce_lr", "factor": 0.5, "than": []}, "got 'than': is 'then' meant?"),
        ({"action": "standing_qk_clip", "treshold": 30.0}, "got 'treshold': is 'threshold' meant?"),
        ({**CLIP, "lr_factr": 0.5}, "items of qk_clip in .*got 'lr_factr': is 'lr_factor' meant?"),
        ({"action": "reduce_lr", "factor": 0.5, 3: 4}, "items of reduce_lr in .*got 3$"),
        (
            {"action": "reduce_lr", "factor": 0.5, "then": [{"action": "set_eps", "eps": 1.0, "esp": 1}]},
            "got 'esp': is 'eps' meant?",
        ),
        (None, r"expected an intervention \(a dict with an 'action'\), got None"),
        ([1], r"expected an intervention \(a dict with an 'action'\), got \[1\]"),
        ({"action": ["reduce_lr"]}, r"got \['reduce_lr'\]"),
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
    optimizer = None if wanted and "lr_factor" in wanted else torch.optim.SGD(model.parameters(), lr=0.1)
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        apply_intervention(optimizer, wanted, model)
    assert not changed(before, weights(model))


@pytest.mark.parametrize("wanted", [CLIP, {"action": "increase_dropout", "layer": "a"}])
def test_a_missing_model(wanted):
    with pytest.raises(ValueError, match=f"expected a model for {wanted['action']}, got None"):
        apply_intervention(None, wanted)


@pytest.mark.parametrize("head_dim", [None, 8])
def test_the_wrong_number_of_numbers(head_dim):
    model = nn.ModuleDict({"attn": PlainBlock("qkv")})
    model["attn"].num_heads = 4
    if head_dim is not None:
        model["attn"].head_dim = head_dim
    message = r"expected 4 heads in layer 'attn' \(one number per head\), got 2"
    for wanted in (
        {**CLIP, "layers": {"attn": [50.0, 60.0]}},
        {"action": "temperature", "layers": {"attn": [2.0] * 2}},
    ):
        with pytest.raises(ValueError, match=message):
            apply_intervention(None, wanted, model)


def test_every_action_has_its_items():
    assert tuple(items.ITEMS) == ACTIONS


def test_a_missing_optimizer():
    with pytest.raises(ValueError, match="expected an optimizer for reduce_lr"):
        apply_intervention(None, learning_rate.propose(0.5, ""))


def test_an_intervention_is_a_dict_that_knows_its_model():
    model = nn.ModuleDict({"attn": PlainBlock("qkv")})
    wanted = Intervention({"action": "temperature", "layers": {"attn": [2.0] * 4}, "reason": ""}, model)
    before = weights(model)
    assert json.loads(json.dumps(wanted)) == wanted == dict(wanted)
    assert pickle.loads(pickle.dumps(wanted)) == wanted and copy.deepcopy(wanted).model is None
    apply_intervention(None, wanted)
    assert changed(before, weights(model)) == {"attn.qkv.weight", "attn.qkv.bias"}


def test_interventions_are_printed_short():
    model = nn.ModuleDict({"attn": PlainBlock("qkv")})
    layers = {"attn": [80.0] * 4}
    wanted = qk_clip.propose(30.0, layers, "head 0 of attn is hot")
    text = "action: qk_clip, threshold: 30.0, layers: 1 layers, reason: head 0 of attn is hot"
    assert repr(wanted) == f"Intervention({text})"
    many = qk_clip.propose(30.0, {f"h.{i}.attn": [80.0] * 96 for i in range(126)}, 100 * "long ")
    assert len(repr(many)) < 500
    applied = apply_intervention(None, wanted, model)
    assert repr(applied) == "Applied(qk_clip: scaled the weights of attn heads [0, 1, 2, 3])"
    applied.revert()
    assert repr(applied).endswith(", reverted)")
    assert len(repr(Applied(many, 1000 * "text ", []))) < 500


# All or nothing


def test_a_fault_half_way_takes_back_what_was_done(monkeypatch):
    model = nn.ModuleDict({"a": PlainBlock("qkv"), "b": PlainBlock("qkv")})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = weights(model)

    def fail(*_):
        raise RuntimeError("planted")

    wanted = qk_clip.propose(30.0, {"a": [80.0] * 4, "b": [80.0] * 4}, "", lr_factor=0.5)
    with monkeypatch.context() as patch:
        patch.setattr(learning_rate.ReduceRate, "_do", fail)  # after the weights
        with pytest.raises(RuntimeError, match="planted"):
            apply_intervention(optimizer, wanted, model)
    assert not changed(before, weights(model))
    multiply = Projections.multiply

    def second_fails(found, query, key):
        if any(parameter is model["b"].qkv.weight for parameter in found.parameters):
            fail()
        multiply(found, query, key)

    monkeypatch.setattr(Projections, "multiply", second_fails)
    for layer in ("a", "b"):
        layout.find(model, layer, 4)
    with pytest.raises(RuntimeError, match="planted"):
        apply_intervention(optimizer, wanted, model)
    assert not changed(before, weights(model))
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_master_weights_in_the_optimizer_are_noticed():
    model = nn.ModuleDict({"attn": PlainBlock("qkv")}).bfloat16()
    masters = [nn.Parameter(p.detach().float()) for p in model.parameters()]
    wanted = qk_clip.propose(30.0, {"attn": [80.0] * 4}, "")
    before = weights(model)
    with pytest.raises(
        ValueError, match="torch.bfloat16 weights of layer 'attn' themselves, got .* master weights"
    ):
        apply_intervention(torch.optim.AdamW(masters), wanted, model)
    assert not changed(before, weights(model))
    for optimizer in (torch.optim.AdamW(model.parameters()), None):
        apply_intervention(optimizer, wanted, model)
    wide = nn.ModuleDict({"attn": PlainBlock("qkv")})
    apply_intervention(torch.optim.AdamW(masters), wanted, wide)  # fp32 weights that it does not train


def test_a_dropout_that_others_use_is_refused():
    model = t.GPT2LMHeadModel(t.GPT2Config(**{**GPT2.to_dict(), "n_layer": 2}))
    first, second = model.transformer.h
    second.attn.attn_dropout = first.attn.attn_dropout
    before = first.attn.attn_dropout.p
    with pytest.raises(ValueError, match="dropout of its own, got 1 other modules"):
        apply_intervention(None, dropout.propose("transformer.h.0.attn", ""), model)
    assert first.attn.attn_dropout.p == before and not dropout.raisable(model, "transformer.h.0.attn")


def test_a_dropout_that_is_computed_is_left_alone():
    class Computed(PlainBlock):
        dropout_p = property(lambda self: 0.1)

    model = nn.ModuleDict({"attn": Computed("qkv")})
    with pytest.raises(ValueError, match="to have an attention dropout"):
        apply_intervention(None, dropout.propose("attn", ""), model)
