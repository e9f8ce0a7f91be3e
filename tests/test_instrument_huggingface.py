"""Hugging Face models: outputs equal the plain model's, statistics equal those of eager attention weights."""

import copy
import inspect
import logging

import pytest
import torch
from families import (
    BATCH,
    FAMILIES,
    LENGTH,
    MAJOR,
    assert_rows_equal_weights,
    enable_checkpointing,
    in_order,
    inputs,
    main_output,
    transformers,
    visible,
)

from hnf_attention.instrumentation import instrument


@pytest.mark.parametrize(
    ("name", "implementation", "mode"),
    [
        pytest.param(name, implementation, mode, marks=() if number % 2 == other else pytest.mark.slow)
        for number, name in enumerate(FAMILIES)
        for implementation in FAMILIES[name].implementations
        for other, mode in enumerate(("probe", "fused"))
    ],
)
@torch.no_grad()
def test_equals_the_eager_model(name, implementation, mode):
    family = FAMILIES[name]
    eager, model = family.build("eager"), family.build(implementation)
    assert model.config._attn_implementation == implementation
    for side in family.padding:
        arguments = inputs(family, side)
        reference = eager(**arguments, output_attentions=True)
        plain = main_output(model(**arguments))
        with instrument(model, mode=mode) as instrumentation:
            output = main_output(model(**arguments))
            measured, coverage = dict(instrumentation.latest), instrumentation.coverage
        keep = arguments.get("attention_mask", torch.ones(BATCH, 1)).bool()
        if mode == "probe":
            torch.testing.assert_close(output, plain, rtol=0, atol=0)
        rows = keep if output.shape[:2] == keep.shape else torch.ones(output.shape[:2], dtype=torch.bool)
        torch.testing.assert_close(output[rows], main_output(reference)[rows], rtol=1e-3, atol=1e-4)

        expected = in_order(family, reference)
        assert len(measured) == len(expected) and not coverage.not_measured, str(coverage)
        assert set(coverage.measured.values()) == {family.measured(implementation, mode)}
        for (layer, measurement), (stack, index, weights) in zip(measured.items(), expected):
            assert layer == measurement.layer and "Attention" in type(model.get_submodule(layer)).__name__
            assert measurement.dtype == torch.float32 and measurement.head_dim * 4 <= 64
            module = model.get_submodule(layer)
            seen = visible(stack, index, weights, keep)
            text = None if (implementation, mode) == ("eager", "probe") else keep
            assert_rows_equal_weights(measurement, weights, seen, getattr(module, "sinks", None), text)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_fused_gradients_equal_the_plain_ones(name, implementation):
    model = FAMILIES[name].build(implementation)
    arguments = inputs(FAMILIES[name], "right")

    def gradients():
        model.zero_grad()
        model(**arguments, labels=arguments["input_ids"]).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    plain = gradients()
    with instrument(model, mode="fused") as instrumentation:
        fused = gradients()
        how = set(instrumentation.coverage.measured.values())
        assert how == {FAMILIES[name].measured(implementation, "fused")}
    for parameter, gradient in plain.items():
        scale = gradient.abs().max()
        torch.testing.assert_close(fused[parameter], gradient, rtol=1e-3, atol=1e-5 * float(scale))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_restore_is_exact_and_other_models_are_untouched(implementation):
    from transformers.models.llama import modeling_llama

    def state():
        return (
            torch.nn.functional.scaled_dot_product_attention,
            transformers.AttentionInterface()["sdpa"],
            modeling_llama.eager_attention_forward,
        )

    before = state()
    family = FAMILIES["llama"]
    model, other = family.build(implementation), family.build(implementation)
    arguments = inputs(family, "left")
    plain = model(**arguments).logits
    keys, config = list(model.state_dict()), model.config.to_dict()
    with pytest.raises(KeyError, match="user code"), instrument(model) as instrumentation:
        assert state() != before
        copied = copy.deepcopy(model)
        model(**arguments)
        assert len(instrumentation.latest) == 2
        instrumentation.latest.clear()
        for unmeasured in (other, copied):
            torch.testing.assert_close(unmeasured(**arguments).logits, plain, rtol=0, atol=0)
        assert not instrumentation.latest
        assert model.config._attn_implementation == implementation and model.config.to_dict() == config
        raise KeyError("user code")
    assert state() == before
    instrumentation.restore()
    assert state() == before and list(model.state_dict()) == keys
    torch.testing.assert_close(model(**arguments).logits, plain, rtol=0, atol=0)
    assert not instrumentation.latest


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("mode", ["probe", "fused"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_gradient_checkpointing_counts_each_layer_once(implementation, mode, use_reentrant):
    model = FAMILIES["llama"].build(implementation).train()
    arguments = inputs(FAMILIES["llama"], "right")

    def step():
        model.zero_grad()
        model(**arguments, labels=arguments["input_ids"]).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = step()
    enable_checkpointing(model, use_reentrant)
    if use_reentrant:
        model.enable_input_require_grads()
    with instrument(model, mode=mode) as instrumentation:
        seen = []
        instrumentation.on_measure = lambda measurement: seen.append(measurement.layer)
        checkpointed = step()
    assert seen == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    for got, expected in zip(checkpointed, plain):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("mode", ["probe", "fused"])
@torch.no_grad()
def test_generation_with_a_cache_measures_every_head_of_single_queries(implementation, mode, cache):
    """transformers packs a group of query heads into rows of SDPA here: heads must come out apart."""
    family = FAMILIES["llama"]
    model = family.build(implementation)
    arguments = inputs(family, "left")
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    reference = family.build("eager").generate(**arguments, **options, output_attentions=True)
    with instrument(model, mode=mode) as instrumentation:
        measured = []
        instrumentation.on_measure = measured.append
        generated = model.generate(**arguments, **options, cache_implementation=cache)
    assert generated.sequences.tolist() == reference.sequences.tolist()
    assert len(measured) == 4 * 2
    for step in range(1, 4):
        for layer in range(2):
            measurement, weights = measured[2 * step + layer], reference.attentions[step][layer]
            seen = torch.ones(BATCH, 1, weights.shape[-1], dtype=torch.bool)
            seen[:, 0, :LENGTH] = arguments["attention_mask"].bool()
            assert_rows_equal_weights(measurement, weights, seen)


@torch.no_grad()
def test_static_cache_prefill_leaves_unwritten_keys_out():
    family = FAMILIES["llama"]
    model = family.build("sdpa")
    ids = inputs(family, "none")["input_ids"]
    weights = family.build("eager")(ids, output_attentions=True).attentions
    cache = transformers.StaticCache(config=model.config, max_cache_len=48)
    # transformers renamed the argument in 5.24
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    with instrument(model, mode="fused") as instrumentation:
        model(ids, **{name: cache})
    for measurement, layer_weights in zip(instrumentation.latest.values(), weights):
        seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(BATCH, -1, -1)
        assert_rows_equal_weights(measurement, layer_weights, seen)


@pytest.mark.parametrize(("implementation", "additive"), [("eager", True), ("sdpa", True), ("sdpa", False)])
@pytest.mark.parametrize("mode", ["probe", "fused"])
@torch.no_grad()
def test_a_users_own_mask_of_four_dimensions(implementation, mode, additive):
    """Two texts in a sequence, of which neither sees the other."""
    family = FAMILIES["llama"]
    eager, model = family.build("eager"), family.build(implementation)
    text = torch.arange(LENGTH) >= 11
    seen = (torch.ones(LENGTH, LENGTH).tril().bool() & (text[:, None] == text)).expand(BATCH, -1, -1)
    bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
    ids = inputs(family, "none")["input_ids"]
    weights = eager(ids, attention_mask=bias, output_attentions=True).attentions
    arguments = {"input_ids": ids, "attention_mask": bias if additive else seen[:, None]}
    plain = model(**arguments).logits
    with instrument(model, mode=mode, strict=True) as instrumentation:
        output = model(**arguments).logits
    tolerance = {"rtol": 0, "atol": 0} if mode == "probe" else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(output, plain, **tolerance)
    for measurement, layer_weights in zip(instrumentation.latest.values(), weights, strict=True):
        assert_rows_equal_weights(measurement, layer_weights, seen)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_layers_are_told_apart_without_a_layer_idx(implementation):
    model = FAMILIES["bert"].build(implementation)
    arguments = inputs(FAMILIES["bert"], "right")
    for module in model.modules():
        vars(module).pop("layer_idx", None)
    with instrument(model, strict=True) as instrumentation:
        model(**arguments)
    assert list(instrumentation.latest) == [f"encoder.layer.{i}.attention.self" for i in range(2)]


@torch.no_grad()
def test_fused_over_eager_still_returns_weights_when_asked():
    model = FAMILIES["gpt2"].build("eager")
    arguments = inputs(FAMILIES["gpt2"], "none")
    plain = model(**arguments, output_attentions=True)
    with instrument(model, mode="fused") as instrumentation:
        output = model(**arguments, output_attentions=True)
    torch.testing.assert_close(output.attentions, plain.attentions, rtol=0, atol=0)
    how = set(instrumentation.coverage.measured.values())
    assert how == {"probe: attention weights may be asked for (transformers eager)"}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_dropout_is_the_models_own(implementation):
    model = FAMILIES["gpt2"].build(implementation).train()
    arguments = inputs(FAMILIES["gpt2"], "none")
    torch.manual_seed(3)
    plain = model(**arguments).logits
    with instrument(model, mode="fused") as instrumentation:
        torch.manual_seed(3)
        output = model(**arguments).logits
    torch.testing.assert_close(output, plain, rtol=0, atol=0)
    how = set(instrumentation.coverage.measured.values())
    assert how == {f"probe: dropout (transformers {implementation})"}


T5_BY_HAND = pytest.mark.skipif(MAJOR == 4, reason="T5 of transformers 4 is caught at its softmax")


@T5_BY_HAND
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_trained_position_bias_keeps_its_gradient(implementation):
    model = FAMILIES["t5"].build(implementation)
    model.config.dropout_rate = 0.0
    arguments = inputs(FAMILIES["t5"], "right")
    bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    model(**arguments).logits.square().mean().backward()
    plain, bias.grad = bias.grad, None
    with instrument(model, mode="fused") as instrumentation:
        model(**arguments).logits.square().mean().backward()
    torch.testing.assert_close(bias.grad, plain, rtol=1e-3, atol=1e-6)
    how = instrumentation.coverage.measured
    assert how["encoder.block.0.layer.0.SelfAttention"].startswith("probe: the additive mask requires")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", [pytest.param("t5", marks=T5_BY_HAND), "gpt2"])
@torch.no_grad()
def test_autocast(name, implementation):
    """Position biases are in fp32 beside bf16 queries; statistics are those of the rounded queries."""
    model, arguments = FAMILIES[name].build(implementation), inputs(FAMILIES[name], "right")
    with instrument(model) as instrumentation:
        model(**arguments)
        expected = dict(instrumentation.latest)
    with instrument(model) as instrumentation, torch.autocast("cpu", dtype=torch.bfloat16):
        model(**arguments)
    assert not instrumentation.coverage.not_measured and len(instrumentation.latest) == len(expected)
    first = next(iter(expected))
    assert instrumentation.latest[first].dtype == torch.bfloat16
    torch.testing.assert_close(
        instrumentation.latest[first].rows.entropy, expected[first].rows.entropy, rtol=0.1, atol=0.1
    )


def test_another_implementation_is_left_alone_and_listed(caplog):
    def custom(module, query, key, value, attention_mask, **kwargs):
        return value.transpose(1, 2).contiguous(), None

    model = FAMILIES["gpt2"].build("eager")
    transformers.AttentionInterface.register("custom_kernel", custom)
    try:
        model.config._attn_implementation = "custom_kernel"
        with instrument(model, strict=True) as instrumentation, caplog.at_level(logging.WARNING):
            with pytest.raises(RuntimeError, match="custom_kernel"):
                model(**inputs(FAMILIES["gpt2"], "none"))
            reasons = instrumentation.coverage.not_measured
        assert model.config._attn_implementation == "custom_kernel"
    finally:
        del transformers.AttentionInterface._global_mapping["custom_kernel"]
    assert list(reasons) == ["transformer.h.0.attn", "transformer.h.1.attn"]
    assert all('attn_implementation="sdpa", "eager" or' in reason for reason in reasons.values())


@pytest.mark.skipif(MAJOR == 4, reason="BERT of transformers 4 chooses its attention when it is built")
@torch.no_grad()
def test_parts_with_implementations_of_their_own_and_a_change_in_between():
    """A composite model: encoder and decoder each keep their own implementation."""
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(**FAMILIES["bert"].options),
        transformers.BertConfig(**FAMILIES["bert"].options, is_decoder=True, add_cross_attention=True),
    )
    model = transformers.EncoderDecoderModel(config).eval()
    model.encoder.config._attn_implementation = "eager"
    model.decoder.config._attn_implementation = "sdpa"
    ids = inputs(FAMILIES["bert"], "none")["input_ids"]
    with instrument(model) as instrumentation:
        model(input_ids=ids, decoder_input_ids=ids)
        measured = instrumentation.coverage.measured
        assert {how for layer, how in measured.items() if layer.startswith("encoder")} == {
            "probe (transformers eager)"
        }
        assert {how for layer, how in measured.items() if layer.startswith("decoder")} == {
            "probe (transformers sdpa)"
        }
        assert len(measured) == 6 and not instrumentation.coverage.not_measured
        model.decoder.config._attn_implementation = "eager"
        model(input_ids=ids, decoder_input_ids=ids)
        assert set(instrumentation.coverage.measured.values()) == {"probe (transformers eager)"}


def test_a_hand_written_path_inside_a_model_is_caught_at_its_softmax():
    family = FAMILIES["gpt2"]
    model = copy.deepcopy(family.build("eager"))
    for block in model.transformer.h[:1]:
        block.attn.reorder_and_upcast_attn = True
    with instrument(model) as instrumentation:
        model(**inputs(family, "none"))
    assert instrumentation.coverage.measured == {
        "transformer.h.0.attn": "probe (softmax)",
        "transformer.h.1.attn": "probe (transformers eager)",
    }
