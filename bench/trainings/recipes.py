"""The models that are trained, made from configurations as their families have them, and text for them.

Every one comes in a tiny form for a CPU. The numbers that shape its attention (head dimension, grouped heads, window,
sinks, latent ranks) are in the large form those of the published models; the rest is smaller.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

import hnf_attention.integrations.transformers  # noqa: F401  registers OURS
from hnf_attention.cli.demo.model import standard_library_text

OURS = "hnf_attention"
BYTES = 256


class Recipe(NamedTuple):
    """One family of models.

    kind: names transformers' classes, KindConfig and KindForCausalLM; config: where the former has another name.
    shape: options of its configuration. tiny: those that differ in the tiny form. implementation: the attention that
    transformers trains it with. batch, length: in sequences and tokens, of the large form and of the tiny one.
    """

    kind: str
    implementation: str
    shape: dict[str, Any]
    tiny: dict[str, Any]
    batch: tuple[int, int]
    length: tuple[int, int]
    config: str = ""


COMMON = {"vocab_size": BYTES, "use_cache": False, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
TINY = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}

RECIPES = {
    "gpt_oss": Recipe(
        "GptOss",
        "eager",  # transformers has no SDPA for learned sinks
        dict(
            hidden_size=1024,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=16,
            num_key_value_heads=2,
            head_dim=64,
            sliding_window=128,
            num_local_experts=8,
            num_experts_per_tok=2,
        ),
        TINY
        | {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "sliding_window": 12,
            "num_local_experts": 4,
        },
        (2, 2),
        (2048, 48),
    ),
    "gemma3": Recipe(
        "Gemma3",
        "sdpa",
        dict(
            hidden_size=1152,
            intermediate_size=3456,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=256,
            query_pre_attn_scalar=256,
            sliding_window=512,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
        TINY | {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]},
        (2, 2),
        (4096, 48),
        "Gemma3TextConfig",
    ),
    "mla": Recipe(
        "DeepseekV3",
        "sdpa",
        dict(
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=4,
            first_k_dense_replace=4,  # no experts
            num_attention_heads=8,
            num_key_value_heads=8,
            q_lora_rank=768,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
        ),
        TINY
        | {
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
        },
        (2, 2),
        (4096, 48),
    ),
    "packs": Recipe(
        "Llama",
        "sdpa",
        dict(
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=4,
            num_attention_heads=16,
            num_key_value_heads=4,
            head_dim=64,
            max_position_embeddings=8192,
        ),
        TINY | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
        (1, 1),
        (4096, 96),
    ),
}


def make(recipe: Recipe, device: torch.device, implementation: str, **options: Any) -> nn.Module:
    """The model with its weights from seed 0: bf16 on a card, fp32 and tiny on a CPU.

    Queries and sinks start larger than in transformers, so that the softmax is not uniform: scores are a few nats.
    """
    tiny = device.type == "cpu"
    shape = COMMON | recipe.shape | (recipe.tiny if tiny else {}) | options
    config = getattr(transformers, recipe.config or f"{recipe.kind}Config")(**shape)
    kind: Callable[..., Any] = getattr(transformers, f"{recipe.kind}ForCausalLM")._from_config
    torch.manual_seed(0)
    with device:
        model = kind(
            config, attn_implementation=implementation, dtype=torch.float32 if tiny else torch.bfloat16
        )
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                nn.init.normal_(parameter)
            elif name.endswith(("q_proj.weight", "q_b_proj.weight")):
                nn.init.normal_(parameter, std=(0.5 if tiny else 0.08))
    return model.train()


def batches(recipe: Recipe, device: torch.device, count: int) -> list[dict[str, Tensor]]:
    """So many batches of bytes of the standard library's sources."""
    tiny = device.type == "cpu"
    batch, length = recipe.batch[tiny], recipe.length[tiny]
    tokens = standard_library_text(count * batch * length).view(count, batch, length).long().to(device)
    return [{"input_ids": x, "labels": x} for x in tokens]


def window_of(model: nn.Module, layer: int) -> int | None:
    """How many keys a query of this layer sees, itself included; None for all before it."""
    config: Any = model.config
    kinds = getattr(config, "layer_types", None)
    return config.sliding_window if kinds is not None and kinds[layer] == "sliding_attention" else None
