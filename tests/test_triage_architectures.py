"""Traces of faults in other architectures than those of the benchmark, and of other kinds."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hnf_attention import trace_non_finite
from hnf_attention.diagnosis.triage import causes

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

TOKENS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
SIZES = dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
ALL = (0, 1, 2, 3)


def language(kind, model, **options):
    """A model with random weights, and a batch for it."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**options)
    ids = torch.randint(1, 40, (2, 12))
    made = getattr(transformers, f"{kind}{model}")(config)
    return made, dict(input_ids=ids, labels=ids.clone())


def nan_at(model, name, index, value=torch.nan):
    with torch.no_grad():
        model.get_parameter(name)[index] = value


def scaled(model, name, rows, factor):
    with torch.no_grad():
        model.get_parameter(name)[rows] *= factor


def neox():
    model, batch = language("GPTNeoX", "ForCausalLM", **SIZES, **TOKENS, max_position_embeddings=16)
    nan_at(model, "gpt_neox.layers.1.attention.query_key_value.weight", (2 * 24 + 3, 5), torch.inf)
    return model, batch, (causes.WEIGHT, "gpt_neox.layers.1.attention", (2,))


def falcon_of_one_key_head():
    model, batch = language(
        "Falcon",
        "ForCausalLM",
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        **TOKENS,
    )
    nan_at(model, "transformer.h.1.self_attention.query_key_value.weight", (2 * 8 + 3, 5))
    return model, batch, (causes.WEIGHT, "transformer.h.1.self_attention", (2,))


def bloom():
    model, batch = language(
        "Bloom", "ForCausalLM", vocab_size=40, hidden_size=32, n_layer=2, n_head=4, **TOKENS
    )
    scaled(model, "transformer.h.0.self_attention.query_key_value.weight", slice(24, 40), 4000)
    return model.half(), batch, (causes.FP16_PRODUCT, "transformer.h.0.self_attention", (1,))


def mistral_fp16():
    model, batch = language(
        "Mistral", "ForCausalLM", **SIZES, **TOKENS, num_key_value_heads=2, attn_implementation="eager"
    )
    scaled(model, "model.layers.1.self_attn.q_proj.weight", slice(24, 32), 3000)
    scaled(model, "model.layers.1.self_attn.k_proj.weight", slice(8, 16), 3000)
    return model.half(), batch, (causes.FP16_PRODUCT, "model.layers.1.self_attn", (3,))


def qwen3_norm():
    model, batch = language("Qwen3", "ForCausalLM", **SIZES, **TOKENS, num_key_value_heads=2, head_dim=8)
    nan_at(model, "model.layers.1.self_attn.q_norm.weight", 3)
    return model, batch, (causes.WEIGHT, "model.layers.1.self_attn", ALL)


def gptj():
    sizes = dict(vocab_size=40, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=16)
    model, batch = language("GPTJ", "ForCausalLM", **sizes, **TOKENS)
    nan_at(model, "transformer.h.1.attn.v_proj.weight", (17, 5))
    return model, batch, (causes.WEIGHT, "transformer.h.1.attn", (2,))


def deberta():
    relative = dict(relative_attention=True, pos_att_type=["p2c", "c2p"], max_position_embeddings=16)
    model, batch = language("DebertaV2", "ForMaskedLM", **SIZES, **relative)
    nan_at(model, "deberta.encoder.layer.1.attention.self.query_proj.weight", (9, 5))
    return model, batch, (causes.WEIGHT, "deberta.encoder.layer.1.attention.self", (1,))


def t5_bias():
    sizes = dict(
        vocab_size=40, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model, batch = language("T5", "ForConditionalGeneration", **sizes)
    name = "encoder.block.0.layer.0.SelfAttention"
    nan_at(model, f"{name}.relative_attention_bias.weight", (slice(None), 2))
    return model, batch, (causes.WEIGHT, name, (2,))


def mixtral_expert():
    model, batch = language(
        "Mixtral", "ForCausalLM", **SIZES, **TOKENS, num_key_value_heads=2, num_local_experts=2
    )
    gate = next(name for name, _ in model.named_parameters() if "layers.1" in name and "gate.weight" in name)
    nan_at(model, gate, (1, 5))
    return model, batch, (causes.WEIGHT, gate.removesuffix(".weight"), ())


def gemma2_rotary():
    model, batch = language(
        "Gemma2", "ForCausalLM", **SIZES, num_key_value_heads=2, head_dim=8, pad_token_id=0
    )
    model.model.rotary_emb.inv_freq[1] = torch.nan
    return model, batch, (causes.WEIGHT, "model.rotary_emb", ())


def vit_pixels():
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
    )
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config)
    pixels = torch.randn(2, 3, 16, 16)
    pixels[1, 0, 5, 5] = torch.inf
    batch = dict(pixel_values=pixels, labels=torch.tensor([0, 1]))
    return model, batch, (causes.INPUT, "vit.embeddings.patch_embeddings.projection", ())


def encoder(**options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return model, lambda: model(torch.randn(2, 12, 32), **options).square().mean()


def encoder_key():
    model, run = encoder()
    nan_at(model, "layers.1.self_attn.in_proj_weight", (32 + 9, 3))
    return model, run, (causes.WEIGHT, "layers.1.self_attn", (1,))


def encoder_padding():
    padding = torch.zeros(2, 12, dtype=torch.bool)
    padding[1] = True
    model, run = encoder(src_key_padding_mask=padding)
    return model, run, (None, None, ())  # scaled_dot_product_attention gives 0 there


def multihead(**options):
    torch.manual_seed(0)
    model = nn.MultiheadAttention(32, 4, batch_first=True).to(options.pop("dtype", torch.float32))
    x = torch.randn(2, 12, 32).to(model.in_proj_weight.dtype)
    return model, lambda: model(x, x, x, **options)[0].float().square().mean()


def multihead_product():
    model, run = multihead(dtype=torch.float16)
    scaled(model, "in_proj_weight", slice(16, 24), 3000)
    scaled(model, "in_proj_weight", slice(48, 56), 3000)
    return model, run, (causes.FP16_PRODUCT, "", (2,))


def multihead_padding():
    padding = torch.zeros(2, 12, dtype=torch.bool)
    padding[1] = True
    model, run = multihead(key_padding_mask=padding)
    return model, run, (causes.EMPTY_ROW, "", ALL)


def compiled():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    nan_at(model, "1.weight", (0, 2))
    wrapped = torch.compile(model, backend="eager")
    wrapped(torch.ones(2, 4))
    return wrapped, lambda: wrapped(torch.ones(3, 4)).sum(), (causes.WEIGHT, "1", ())


def a_target_of_the_closure():
    model, target = nn.Linear(4, 4), torch.zeros(3, 4)
    target[1, 2] = torch.nan
    return model, lambda: F.mse_loss(model(torch.ones(3, 4)), target), (causes.INPUT, None, ())


def a_deviation_of_equal_numbers():
    class Standardised(nn.Module):
        def forward(self, x):
            return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)

    model = nn.Sequential(nn.Linear(4, 4), Standardised())
    nn.init.constant_(model[0].weight, 0.5)
    nn.init.zeros_(model[0].bias)
    return model, lambda: model(torch.ones(2, 4)).sum(), (causes.UNDEFINED, "1", ())


def a_logarithm_behind_where():
    class Logarithm(nn.Module):
        def forward(self, x):
            return torch.where(x > 0, torch.log(x), x)

    model = nn.Sequential(nn.Linear(4, 4), Logarithm())
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    return model, lambda: model(torch.ones(2, 4)).sum(), (causes.UNDEFINED, "1", ())


def a_square_in_float16():
    model = nn.Linear(4, 4).half()
    return (
        model,
        lambda: ((model(torch.ones(2, 4).half()) * 0 + 300) ** 2).sum(),
        (causes.ACTIVATION, None, ()),
    )


def rmsprop_without_epsilon():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model[1].weight.register_hook(lambda gradient: gradient * 0)
    optimizer = torch.optim.RMSprop(model.parameters(), 0.1, eps=0.0)
    return model, lambda: model(torch.ones(2, 4)).sum(), (causes.EPSILON, "1", ()), optimizer


def amsgrad_second_moment():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model[0].weight.register_hook(lambda gradient: gradient * 1e25)
    optimizer = torch.optim.Adam(model.parameters(), 0.1, amsgrad=True)
    return model, lambda: model(torch.ones(2, 4)).sum(), (causes.SECOND_MOMENT, "0", ()), optimizer


FAULTS = [
    *(neox, falcon_of_one_key_head, bloom, mistral_fp16, qwen3_norm, gptj, deberta, t5_bias, mixtral_expert),
    *(
        gemma2_rotary,
        vit_pixels,
        encoder_key,
        encoder_padding,
        multihead_product,
        multihead_padding,
        compiled,
    ),
    *(a_target_of_the_closure, a_deviation_of_equal_numbers, a_logarithm_behind_where, a_square_in_float16),
    *(rmsprop_without_epsilon, amsgrad_second_moment),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_fault_is_traced(fault):
    model, batch, expected, *optimizer = fault()
    trace = trace_non_finite(model, batch, optimizer=optimizer[0] if optimizer else None)
    assert (trace.cause, trace.layer, trace.heads) == expected, trace
