"""Small configurations of many families, and the spread of their first attention's scores with random weights."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

TOKENS, SEQUENCES, VOCABULARY = 96, 4, 512
_TEXT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ENCODER = _TEXT | {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 256,
}
_DECODER = _ENCODER | {"num_key_value_heads": 2}
_HEADS = _DECODER | {"head_dim": 64}
_LATENT = _ENCODER | {
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
_EXPERTS = {
    "first_k_dense_replace": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 64,
}
_GPT2 = _TEXT | {"n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 256}
_T5 = _TEXT | {"d_model": 256, "d_kv": 64, "num_layers": 2, "num_heads": 4, "d_ff": 512}
_BART = _TEXT | {
    "d_model": 256,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 512,
    "decoder_ffn_dim": 512,
    "max_position_embeddings": 256,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
_VISION = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "image_size": 64,
    "patch_size": 8,
}
# Families whose spread the fields of the configuration tell.
PLAIN = {
    "bart": _BART,
    "bert": _ENCODER,
    "biogpt": _ENCODER,
    "camembert": _ENCODER,
    "codegen": _GPT2 | {"rotary_dim": 16},
    "cohere": _DECODER,
    "deberta": _ENCODER,
    "deberta-v2": _ENCODER,
    "distilbert": _TEXT | {"dim": 256, "n_layers": 2, "n_heads": 4, "hidden_dim": 512},
    "esm": _ENCODER,
    "falcon": _ENCODER,
    "gemma": _HEADS,
    "gemma2": _HEADS | {"query_pre_attn_scalar": 32},
    "gemma3_text": _HEADS,
    "glm4": _HEADS,
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neox": _ENCODER,
    "gptj": _GPT2 | {"rotary_dim": 16},
    "granite": _DECODER | {"attention_multiplier": 0.0625},
    "helium": _HEADS,
    "llama": _DECODER,
    "mbart": _BART,
    "mistral": _DECODER,
    "mpnet": _ENCODER,
    "mt5": _T5,
    "olmo2": _DECODER,
    "opt": _ENCODER | {"ffn_dim": 512, "word_embed_proj_dim": 256},
    "phi": _DECODER,
    "phi3": _DECODER,
    "qwen2": _DECODER,
    "qwen3": _HEADS,
    "roberta": _ENCODER,
    "roformer": _ENCODER,
    "smollm3": _DECODER,
    "stablelm": _DECODER,
    "starcoder2": _DECODER,
    "t5": _T5,
    "umt5": _T5,
    "vit": _VISION,
}
# Families of which only the class tells: no scale, QK-norm, latent attention, inputs that no norm layer has seen,
# an initialisation of its own, a rotation that scales.
CLASS = {
    "albert": _ENCODER | {"embedding_size": 64},
    "apertus": _DECODER,
    "clip_vision_model": _VISION,
    "deepseek_v2": _LATENT | _EXPERTS,
    "deepseek_v3": _LATENT | _EXPERTS,
    "doge": _DECODER,
    "electra": _ENCODER | {"embedding_size": 64},
    "exaone4": _DECODER,
    "gpt_neo": _TEXT
    | {
        "hidden_size": 256,
        "num_layers": 2,
        "num_heads": 4,
        "max_position_embeddings": 256,
        "attention_types": [[["global", "local"], 1]],
    },
    "gpt_oss": _HEADS | {"num_local_experts": 4},
    "hunyuan_v1_dense": _HEADS,
    "lfm2": _DECODER | {"layer_types": ["full_attention"] * 2},
    "marian": _BART | {"decoder_vocab_size": VOCABULARY},
    "minicpm3": _LATENT,
    "modernbert": _ENCODER,
    "nanochat": _DECODER,
    "nemotron": _DECODER,
    "pegasus": _BART,
    "xlnet": _TEXT | {"d_model": 256, "n_layer": 2, "n_head": 4, "d_inner": 512},
    "youtu": _LATENT,
}
NOT_KNOWN = {
    "bloom": _TEXT | {"hidden_size": 256, "n_layer": 2, "n_head": 4},
    "longformer": _ENCODER | {"attention_window": [32, 32]},
    "mpt": _TEXT | {"d_model": 256, "n_layers": 2, "n_heads": 4, "max_seq_len": 256},
}
_SINGLE = ("gpt_oss",)  # its experts have no kernel in fp64


def configuration(family):
    return transformers.AutoConfig.for_model(family, **(PLAIN | CLASS | NOT_KNOWN)[family])


def measured_spread(config):
    """Root mean square spread within the rows of the last third, from the eager weights of a whole model, nats."""
    torch.manual_seed(1)
    dtype = torch.float32 if config.model_type in _SINGLE else torch.float64
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").to(dtype).eval()
    if model.main_input_name == "pixel_values":
        sample = {"pixel_values": torch.randn(16, 3, 64, 64, dtype=dtype)}
    else:
        ids = torch.randint(5, VOCABULARY, (SEQUENCES, TOKENS))
        sample = {"input_ids": ids} | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})
    with torch.no_grad():
        outputs = model(**sample, output_attentions=True)
    weights = (outputs.get("attentions") or outputs.get("encoder_attentions"))[0]
    rows = weights[..., -(weights.shape[-2] // 3) :, :].double()
    seen = rows > 0
    scores = rows.clamp(min=1e-300).log()
    mean = (scores * seen).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True)
    square = ((scores - mean).square() * seen).sum(-1) / seen.sum(-1)
    return float(square.mean().sqrt())
