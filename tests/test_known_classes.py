"""The classes whose weights are taken without a trial: each is proved inside a whole model; a changed one is tried."""

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from attention_layers import LLAMA, SIZES, changed, weights
from proofs import contradiction
from torch import nn

from hnf_attention import MultiheadAttention, apply_intervention, instrument
from hnf_attention.interventions import known_classes, layout, qk_clip, temperature
from hnf_attention.nn import GroupedQueryAttention

EXHAUSTIVE = (pytest.mark.slow, pytest.mark.exhaustive)
QUICK = ("GPT-NeoX",)
#: Architectures with projections under the usual names that are not treated, and what else their weights do.
LOOK_ALIKES = {
    "ConvBERT": "the queries also make the kernels of a convolution",
    "SAM vision": "the queries also make the relative positions",
}
LAYER = "model.layers.0.self_attn"


def layers(model, arguments):
    """Name and number of heads of every measured layer."""
    with instrument(model, mode="probe") as handle, torch.no_grad():
        model(**arguments)
    return {layer: found.rows.lse.shape[1] for layer, found in handle.latest.items()}


@pytest.mark.filterwarnings("ignore")  # what models of transformers 4 do on their own
@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x in QUICK else EXHAUSTIVE) for x in ARCHITECTURES]
)
def test_what_is_found_by_class_is_proved_in_the_whole_model(name):
    architecture = ARCHITECTURES[name]
    if not architecture.exists:
        pytest.skip(f"transformers {transformers.__version__} has no {architecture.model}")
    for implementation in architecture.compared():
        model = architecture.build(implementation)
        arguments = architecture.arguments(model)
        for layer, heads in layers(model, arguments).items():
            try:
                found = layout.find(model, layer, heads)
            except ValueError:
                continue
            assert name not in LOOK_ALIKES
            assert contradiction(model, arguments, layer, found)[0] is None, layer


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alikes_are_contradicted(name, monkeypatch):
    """The proof can fail: it does where these classes are taken for known ones."""
    model = ARCHITECTURES[name].build("eager" if name == "ConvBERT" else "sdpa")
    arguments = ARCHITECTURES[name].arguments(model)
    layer, heads = next(iter(layers(model, arguments).items()))
    with pytest.raises(ValueError, match="expected proof"):
        layout.find(model, layer, heads)
    monkeypatch.setattr(known_classes, "includes", lambda module: True)
    assert contradiction(model, arguments, layer, layout.find(model, layer, heads))[0] is not None


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
def test_most_architectures_are_treated():
    treated = set()
    for name, architecture in ARCHITECTURES.items():
        if architecture.exists:
            model = architecture.build(architecture.compared()[0])
            for layer, heads in layers(model, architecture.arguments(model)).items():
                try:
                    layout.find(model, layer, heads)
                except ValueError:
                    continue
                treated.add(name)
    assert "ALBERT" not in treated  # one module's weights serve all of its layers
    assert len(treated) >= (111 if transformers.__version__ >= "5" else 105)


def test_torchs_multihead_attention_is_known_and_so_are_ours():
    for module in (nn.MultiheadAttention(8, 2), MultiheadAttention(8, 2), GroupedQueryAttention(8, 2)):
        assert known_classes.includes(module)


def test_ours_with_grouped_queries_is_scaled_head_by_head():
    model, x = nn.Sequential(GroupedQueryAttention(16, 4, 2, bias=True)), torch.randn(2, 9, 16)
    (layer,) = model
    before = model(x), layer.row_stats.max_logit
    applied = apply_intervention(None, temperature.propose({"0": [2.0, 1.0, 1.0, 4.0]}, ""), model)
    model(x)
    factors = torch.tensor([2.0, 1.0, 1.0, 4.0])[:, None]
    torch.testing.assert_close(layer.row_stats.max_logit * factors, before[1])
    applied.revert()
    assert torch.equal(model(x), before[0])


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(LLAMA)


def refused(model, message, layer=LAYER):
    before = weights(model)
    for wanted in (
        qk_clip.propose(30.0, {layer: [99.0] * 4}, ""),
        temperature.propose({layer: [2.0] * 4}, ""),
    ):
        with pytest.raises(ValueError, match=message):
            apply_intervention(None, wanted, model)
    assert not changed(before, weights(model))


def test_a_class_of_the_same_name_elsewhere_is_tried():
    model = llama()
    mine = type("LlamaAttention", (type(model.model.layers[0].self_attn),), {})
    assert known_classes.includes(model.model.layers[0].self_attn)
    model.model.layers[0].self_attn.__class__ = mine
    assert not known_classes.includes(model.model.layers[0].self_attn)
    refused(model, "expected proof")


@pytest.mark.parametrize("where", ["class", "module"])
def test_another_forward_in_a_known_class_is_tried(where, monkeypatch):
    model = llama()
    attention = model.model.layers[0].self_attn
    monkeypatch.setattr(type(attention) if where == "class" else attention, "forward", lambda *a, **k: None)
    refused(model, "expected proof")


# Weights that cannot be changed for good


def attention(model):
    return model.model.layers[0].self_attn


@pytest.mark.parametrize("name", ["q_proj.weight", "k_proj.weight"])
def test_frozen_weights_are_refused(name):
    model = llama()
    attention(model).get_parameter(name).requires_grad_(False)
    refused(model, f"trainable weights in {LAYER}.{name.partition('.')[0]}, got frozen ones")


def test_a_frozen_bias_is_refused():
    model = transformers.BertModel(transformers.BertConfig(**SIZES))
    layer = "encoder.layer.0.attention.self"
    model.get_submodule(layer).key.bias.requires_grad_(False)
    refused(model, "trainable weights in .*key, got frozen", layer)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
def test_lora_beside_frozen_weights_is_refused():
    peft = pytest.importorskip("peft")
    for targets in (["q_proj", "k_proj"], ["q_proj"], ["v_proj"], ["up_proj"]):
        config = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
        model = peft.get_peft_model(llama(), config)
        refused(model, "got frozen ones|merge adapters", f"base_model.model.{LAYER}")


class Adapted(nn.Linear):
    """LoRA inside a class that is an nn.Linear, as loralib has it."""

    def forward(self, x):
        return super().forward(x) + x @ torch.ones(x.shape[-1], self.out_features)


@pytest.mark.parametrize("kind", ["class", "forward", "hook", "pre-hook"])
def test_a_projection_that_computes_something_else_is_refused(kind):
    model = llama()
    if kind == "class":
        attention(model).q_proj = Adapted(32, 32, bias=False)
    elif kind == "forward":
        attention(model).q_proj.forward = lambda x: x
    elif kind == "hook":
        attention(model).k_proj.register_forward_hook(lambda module, args, out: out + 1)
    else:
        attention(model).k_proj.register_forward_pre_hook(lambda module, args: None)
    refused(model, "to compute its weight times its input and nothing else")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantised_weights_are_refused(dtype):
    model = llama()
    weight = attention(model).k_proj.weight
    attention(model).k_proj.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    refused(model, f"floating-point weights of 16 bits or more in {LAYER}.k_proj, got {dtype}")


def test_weights_of_inference_mode_are_refused():
    with torch.inference_mode():
        model = llama()
    refused(model, "got a tensor of inference mode")


def test_shared_weights_are_refused():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": 2}))
    first, second = (layer.self_attn for layer in model.model.layers)
    own, second.q_proj = second.q_proj, first.q_proj  # the module
    refused(model, "weights of its own, got some that other modules use too")
    second.q_proj = own
    second.k_proj.weight = first.k_proj.weight  # the parameter
    refused(model, "weights of its own, got some that other modules use too")
    second.k_proj.weight = nn.Parameter(first.k_proj.weight.detach().clone())
    second.k_proj = second.q_proj
    refused(model, "weights of its own, got some that are both", "model.layers.1.self_attn")


def test_the_whole_model_under_two_names_shares_nothing():
    holder = nn.Module()
    holder.model = holder.alias = llama()
    apply_intervention(None, temperature.propose({f"model.{LAYER}": [2.0] * 4}, ""), holder)


def test_one_call_of_a_module_that_runs_several_times_is_refused():
    refused(llama(), "one call of a module that runs several times", f"{LAYER}#1")


def test_a_bias_beside_its_projection_is_refused():
    """As in VideoMAE of transformers 4."""
    model = llama()
    attention(model).q_bias = nn.Parameter(torch.zeros(32))
    refused(model, "got a q_bias beside them")
