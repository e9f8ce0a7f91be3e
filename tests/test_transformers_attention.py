"""attn_implementation="hnf_attention": transformers' models against their own eager attention, in fp32."""

import copy

import pytest
import torch
from compat_helpers import carried_by

from hnf_attention import apply_intervention, compat, instrument
from hnf_attention.nn import row_stats, swap_attention

transformers = pytest.importorskip("transformers")
from tiny_architecture import tiny  # noqa: E402

import hnf_attention.integrations.transformers as ours  # noqa: E402

NAME = ours.NAME
LENGTH, VOCAB = 12, 90
MODELS = {  # class and what differs from tiny sizes; windows are 5 tokens
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {},
    "Gemma2ForCausalLM": {
        "attn_logit_softcapping": 0.5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "Gemma3ForCausalLM": {"layer_types": ["sliding_attention", "full_attention"]},
    "GptOssForCausalLM": {"layer_types": ["sliding_attention", "full_attention"]},
    "Qwen3ForCausalLM": {},
    "GPT2LMHeadModel": {},
}
FIVE = int(transformers.__version__.split(".")[0]) >= 5
if FIVE:  # before, BERT passes AttentionInterface by
    MODELS["BertForMaskedLM"] = {}
QUICK = [("GptOssForCausalLM", "left"), ("BertForMaskedLM", "right")]


def build(name, implementation):
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind._from_config(tiny(kind.config_class, MODELS[name]), attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
            elif parameter.shape[0] == 4:  # sinks
                parameter.normal_()
    return model.eval()


def batch(padding):
    """padding: "left", "right" or None."""
    ids = torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padding is not None:
        mask[0, slice(None, 4) if padding == "left" else slice(-4, None)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def layers(model):
    return [module for module in model.modules() if row_stats(module) is not None]


@pytest.mark.parametrize(
    ("name", "padding"),
    [
        pytest.param(name, padding, marks=[] if (name, padding) in QUICK else pytest.mark.slow)
        for name in MODELS
        for padding in (None, "left", "right")
    ],
)
def test_outputs_and_gradients_are_those_of_eager(name, padding):
    eager, mine, given = build(name, "eager"), build(name, NAME), batch(padding)
    mine.load_state_dict(eager.state_dict())
    eager.load_state_dict(mine.state_dict())
    kept = given["attention_mask"].bool()
    found = []
    for model in (mine, eager):
        logits = model(**given).logits[kept]
        logits.square().mean().backward()
        found.append((logits, [p.grad for p in model.parameters() if p.grad is not None]))
    assert (found[0][0] - found[1][0]).norm() <= 1e-5 * found[1][0].norm()
    assert len(found[0][1]) == len(found[1][1]) > 5
    largest = max(gradient.norm() for gradient in found[1][1])
    assert all((a - b).norm() <= 1e-4 * b.norm() + 1e-6 * largest for a, b in zip(*(x[1] for x in found)))
    assert len(layers(mine)) == 2
    sliding = [
        rows.lse.isfinite()[kept[:, None].expand_as(rows.lse)] for rows in map(row_stats, layers(mine))
    ]
    assert all(x.all() for x in sliding)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("Bert")])
def test_generation_with_a_cache_gives_eagers_tokens(name):
    given, options = batch("left"), {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    options["use_cache"] = True
    eager = build(name, "eager").generate(**given, **options)
    mine = build(name, NAME)
    assert torch.equal(mine.generate(**given, **options), eager)
    rows = row_stats(layers(mine)[-1])
    assert rows.lse.shape == (2, 4, 1)
    assert torch.equal(mine.generate(**given, **options | {"use_cache": False}), eager)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GptOssForCausalLM", "Gemma2ForCausalLM"])
def test_generation_with_a_static_cache_gives_eagers_tokens(name):
    given, options = batch(None), {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    options["use_cache"] = True
    options["disable_compile"] = True
    eager = build(name, "eager").generate(**given, **options)
    assert torch.equal(build(name, NAME).generate(**given, **options), eager)


@pytest.mark.slow
def test_it_is_chosen_by_every_way_that_transformers_has(tmp_path):
    given, first = batch("right"), build("LlamaForCausalLM", "sdpa")
    expected = first(**given).logits
    first.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME)
    made = transformers.AutoModelForCausalLM.from_config(first.config, attn_implementation=NAME)
    made.load_state_dict(first.state_dict())
    first.set_attn_implementation(NAME)
    for model in (first, loaded, made.eval()):
        assert model.config._attn_implementation == NAME
        torch.testing.assert_close(model(**given).logits, expected, atol=2e-5, rtol=1e-4)
        assert len(layers(model)) == 2
    assert layers(copy.deepcopy(first)) == []


@pytest.mark.slow
def test_statistics_are_those_that_instrument_finds_in_eager():
    given, eager, mine = batch("left"), build("GptOssForCausalLM", "eager"), build("GptOssForCausalLM", NAME)
    with instrument(eager) as expected:
        eager(**given)
    with instrument(mine, strict=True) as handle:
        handle._probe = None  # nothing is measured a second time
        mine(**given)
    assert set(handle.coverage.measured.values()) == {"fused (transformers hnf_attention)"}
    seen = given["attention_mask"].bool()[:, None].expand(2, 4, LENGTH)
    for name, measurement in handle.latest.items():
        theirs = expected.latest[name].rows
        for field in ("lse", "entropy", "max_logit"):
            got, wanted = (getattr(x, field)[seen] for x in (measurement.rows, theirs))
            torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)
        assert row_stats(mine.get_submodule(name)) is measurement.rows


@pytest.mark.slow
@pytest.mark.skipif(not FIVE, reason="transformers 4 says less of the masks that it wants")
@carried_by("causal_window")
@pytest.mark.parametrize("name", ["MistralForCausalLM", "GptOssForCausalLM"])
def test_a_window_reaches_the_kernels_as_a_window(name):
    model, seen = build(name, NAME), []
    with instrument(model) as handle:
        handle.on_measure = lambda measurement: seen.append(measurement.options)
        model(**batch(None))
        assert seen[0].window_size == 5 and seen[0].is_causal and seen[0].attn_mask is None
        model(**batch("left"))
        model(**batch(None) | {"input_ids": batch(None)["input_ids"][:, :3], "attention_mask": None})
        ids = batch(None)["input_ids"][:1]
        positions = torch.cat([torch.arange(7), torch.arange(LENGTH - 7)])[None]
        model(input_ids=ids, position_ids=positions, use_cache=False)
    assert seen[2].window_size is None and seen[2].attn_mask is not None  # padding
    assert seen[4].window_size is None and seen[4].attn_mask is None  # shorter than the window
    if name.startswith("Mistral"):  # transformers gives gpt-oss no positions to tell sequences by
        assert seen[6].window_size is None and seen[6].attn_mask is not None  # two sequences
    assert compat.causal_window(lambda *_: True) is None and compat.causal_window(print) is None


@pytest.mark.slow
def test_packed_sequences_see_their_own_keys_only():
    model = build("LlamaForCausalLM", NAME)
    ids = batch(None)["input_ids"][:1]
    positions = torch.cat([torch.arange(5), torch.arange(LENGTH - 5)])[None]
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(input_ids=x).logits for x in ids.split([5, LENGTH - 5], 1)], 1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_dropout_is_applied_in_training():
    model = build("LlamaForCausalLM", NAME)
    expected, rows = model(**batch(None)).logits, row_stats(layers(model)[0])
    model.config.attention_dropout = 0.5
    for module in layers(model):
        module.attention_dropout = 0.5
    assert torch.equal(model(**batch(None)).logits, expected)
    model.train()
    assert not torch.allclose(model(**batch(None)).logits, expected)
    assert torch.equal(row_stats(layers(model)[0]).entropy, rows.entropy)


@carried_by("takes_boolean_masks")
def test_a_model_that_passes_the_interface_by_computes_what_it_computed():
    """BLOOM adds its mask to the scores: a boolean one would be wrong in silence."""
    config = transformers.BloomConfig(hidden_size=16, n_layer=1, n_head=4, vocab_size=99)
    eager = transformers.BloomModel._from_config(config, attn_implementation="eager").eval()
    mine = transformers.BloomModel._from_config(copy.deepcopy(config), attn_implementation=NAME).eval()
    mine.load_state_dict(eager.state_dict())
    assert torch.equal(mine(**batch("left"))[0], eager(**batch("left"))[0]) and layers(mine) == []


@pytest.mark.slow
def test_swap_attention_swaps_its_layers_and_unswaps_them():
    model, given = build("Gemma3ForCausalLM", "sdpa"), batch("left")
    expected = model(**given).logits
    with swap_attention(model) as result:
        assert list(result.swapped.values()) == ['attn_implementation="hnf_attention"'] * 2
        assert not result.not_swapped
        kept = given["attention_mask"].bool()
        torch.testing.assert_close(model(**given).logits[kept], expected[kept], atol=2e-5, rtol=1e-4)
        assert len(layers(model)) == 2
    assert model.config._attn_implementation == "sdpa" and layers(model) == []
    assert torch.equal(model(**given).logits, expected)


@pytest.mark.slow
def test_a_layer_of_an_unknown_class_is_proved_and_treated():
    model, given = build("LlamaForCausalLM", NAME), batch(None)
    layer = model.model.layers[0].self_attn
    layer.__class__ = type("MyAttention", (type(layer),), {})
    with instrument(model):  # which remembers what layers are called with
        model(**given)
    before = row_stats(layer).max_logit
    wanted = {"action": "temperature", "layers": {"model.layers.0.self_attn": [2.0, 1.0, 4.0, 1.0]}}
    applied = apply_intervention(None, wanted, model)
    model(**given)
    factors = torch.tensor([2.0, 1.0, 4.0, 1.0])[:, None]
    torch.testing.assert_close(row_stats(layer).max_logit * factors, before, atol=1e-5, rtol=1e-4)
    applied.revert()


@carried_by("set_attention_implementation")
def test_unswap_gives_each_part_of_a_model_its_own_implementation_back():
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
    text, vision = sizes | {"vocab_size": 40}, sizes | {"image_size": 8, "patch_size": 4}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    configs = model.config, model.text_model.config, model.vision_model.config
    before = [config._attn_implementation for config in configs]
    assert before[1:] == ["eager", "sdpa"]
    with swap_attention(model) as result:
        assert [config._attn_implementation for config in configs] == [NAME] * 3 and len(result.swapped) == 2
    assert [config._attn_implementation for config in configs] == before


def test_swap_attention_says_why_a_model_stays():
    config = transformers.BloomConfig(hidden_size=16, n_layer=1, n_head=4, vocab_size=99)
    model = transformers.BloomModel(config)
    result = swap_attention(model)
    assert not result.swapped and "BloomAttention is neither" in result.not_swapped["h.0.self_attention"]
    assert model.config._attn_implementation != NAME


def test_weights_are_returned_where_they_are_asked_for():
    module = torch.nn.Module()
    q, k, v = (torch.randn(2, heads, 5, 8) for heads in (4, 2, 2))
    mask = torch.ones(1, 1, 5, 7, dtype=torch.bool).tril()  # made for a longer cache
    out, weights = ours.attention_forward(module, q, k, v, mask, output_attentions=True)
    again, none = ours.attention_forward(module, q, k, v, mask)
    torch.testing.assert_close(out, again)
    assert none is None and weights.shape == (2, 4, 5, 5) and weights[..., 0, 1:].eq(0).all()
    torch.testing.assert_close(weights @ v.repeat_interleave(2, 1), out.transpose(1, 2))
    with pytest.raises(ValueError, match="no head_mask"):
        ours.attention_forward(module, q, k, v, mask, head_mask=torch.ones(4))
    with pytest.raises(ValueError, match="four dimensions"):
        ours.attention_forward(module, q, k, v, mask[0])


@pytest.mark.slow
def test_it_compiles_in_one_graph():
    model = build("GptOssForCausalLM", NAME)
    attention = model.model.layers[0].self_attn
    x = torch.randn(2, LENGTH, 32)
    tables = model.model.rotary_emb(x, torch.arange(LENGTH)[None])
    expected, rows = attention(x, tables, None)[0], row_stats(attention)
    torch._dynamo.reset()
    fast = torch.compile(attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(fast(x, tables, None)[0], expected)
    assert row_stats(attention) is not rows
    torch.testing.assert_close(row_stats(attention).entropy, rows.entropy)
