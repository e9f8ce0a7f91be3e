"""Tiny random models of Hugging Face families, and what their eager attention weights say."""

from dataclasses import dataclass

import pytest
import torch
from sinks import sink_mass
from torch import nn

transformers = pytest.importorskip("transformers")

BATCH, LENGTH, VOCAB = 2, 28, 61
MAJOR = int(transformers.__version__.split(".")[0])
SMALL = {"vocab_size": VOCAB, "initializer_range": 0.4}
DECODER = {
    **SMALL,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@dataclass
class Stack:
    """The attention layers that run one after another; `window` of each, None for full attention."""

    weights: str  # field of the model's output that holds the eager weights
    causal: bool
    windows: tuple = (None, None)


@dataclass
class Family:
    model: str
    config: str
    options: dict
    stacks: tuple
    implementations: tuple = ("eager", "sdpa")
    padding: tuple = ("none", "left", "right")
    interface: bool = True  # else its attention is written out in its own file

    def measured(self, implementation: str, mode: str) -> str:
        """What coverage says of it begins like this."""
        if not self.interface:
            return (
                "probe (softmax)" if implementation == "eager" else f"{mode} (scaled_dot_product_attention)"
            )
        if (MAJOR, implementation, mode) == (4, "eager", "fused"):
            return "probe: attention weights may be asked for (transformers eager)"
        return f"{mode} (transformers {implementation})"

    def build(self, implementation: str) -> nn.Module:
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.options)
        model = getattr(transformers, self.model)._from_config(config, attn_implementation=implementation)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("sinks", "relative_attention_bias.weight")):
                    # Small or uninitialised otherwise, which would hide a mistake.
                    parameter.normal_(mean=8.0 if name.endswith("sinks") else 0.0)
        return model.eval()


FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {**SMALL, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64},
        (Stack("attentions", True),),
    ),
    "bert": Family(
        "BertModel",
        "BertConfig",
        {
            **SMALL,
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
        },
        (Stack("attentions", False),),
        interface=MAJOR > 4,
    ),
    "llama": Family("LlamaForCausalLM", "LlamaConfig", DECODER, (Stack("attentions", True),)),
    "mistral": Family(
        "MistralForCausalLM",
        "MistralConfig",
        {**DECODER, "sliding_window": 8},
        (Stack("attentions", True, (8, 8)),),
    ),
    "mistral, window longer than the text": Family(
        "MistralForCausalLM",
        "MistralConfig",
        {**DECODER, "sliding_window": 64},
        (Stack("attentions", True),),
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {
            **DECODER,
            "sliding_window": 8,
            "attn_logit_softcapping": 4.0,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        (Stack("attentions", True, (8, None)),),
        ("eager",),
    ),
    "gpt-oss": Family(
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            **DECODER,
            "sliding_window": 8,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        (Stack("attentions", True, (8, None)),),
        ("eager",),
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCAB,
            "d_model": 48,
            "d_kv": 12,
            "num_heads": 4,
            "d_ff": 64,
            "num_layers": 2,
            "decoder_start_token_id": 0,
        },
        (
            Stack("encoder_attentions", False),
            Stack("decoder_attentions", True),
            Stack("cross_attentions", False),
        ),
        ("eager", "sdpa") if MAJOR > 4 else ("eager",),
        padding=("none", "right", "left"),
        interface=MAJOR > 4,
    ),
    "vit": Family(
        "ViTModel",
        "ViTConfig",
        {
            "initializer_range": 0.4,
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "image_size": 20,
            "patch_size": 4,
        },
        (Stack("attentions", False),),
        padding=("none",),
    ),
}


def padding(side: str) -> torch.Tensor:
    """(BATCH, LENGTH) mask, 1 for text; only the second text is shorter."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    if side == "left":
        mask[1, :9] = 0
    elif side == "right":
        mask[1, -9:] = 0
    return mask


def inputs(family: Family, side: str) -> dict:
    generator = torch.Generator().manual_seed(1)
    if "Vi" in family.model:
        return {"pixel_values": torch.randn(BATCH, 3, 20, 20, generator=generator)}
    ids = torch.randint(1, VOCAB, (BATCH, LENGTH), generator=generator)
    arguments = {"input_ids": ids, "attention_mask": padding(side)}
    if "T5" in family.model:
        arguments["decoder_input_ids"] = torch.randint(1, VOCAB, (BATCH, 20), generator=generator)
    return arguments


def visible(stack: Stack, layer: int, weights: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """(B, M, N): what a query may see, from first principles."""
    num_queries, num_keys = weights.shape[-2:]
    i, j = torch.arange(num_queries)[:, None], torch.arange(num_keys)[None, :]
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool)
    if stack.causal:
        seen &= j <= i
    if stack.windows[layer] is not None:
        seen &= i - j < stack.windows[layer]
    # A decoder's own mask is not padded here; ViT and the like have no mask.
    own = keep.shape[1] == num_keys
    return seen & keep[:, None, :].bool() if own else seen.expand(BATCH, -1, -1)


def in_order(family: Family, outputs) -> list[tuple[Stack, int, torch.Tensor]]:
    """(stack, layer in it, eager weights) in the order in which attention runs."""
    stacks = [
        [(stack, layer, weights) for layer, weights in enumerate(outputs[stack.weights])]
        for stack in family.stacks
    ]
    if len(stacks) == 1:
        return stacks[0]
    encoder, *decoder = stacks
    return encoder + [entry for pair in zip(*decoder) for entry in pair]


def assert_rows_equal_weights(measurement, weights, seen, sinks=None, text=None):
    """Row statistics against eager weights (B, H, M, N), on rows that see any key.

    text: (B, M), the rows to compare. A padding row may differ from the eager model's from the second
    layer on: where its keys are all hidden, eager attention averages all values, others give 0.
    """
    rows, occupied = measurement.rows, seen.any(-1)[:, None].expand(weights.shape[:3])
    alone = torch.tensor(-torch.inf) if sinks is None else sinks[:, None]  # of a row that sees no key
    assert (rows.entropy[~occupied] == 0).all()
    assert (rows.lse[~occupied] == alone.expand_as(rows.lse)[~occupied]).all()
    if text is not None and text.shape[1] == occupied.shape[2]:
        occupied = occupied & text[:, None]
    weights = weights.double()
    torch.testing.assert_close(
        measurement.visible_keys.expand(weights.shape[:3]), seen.sum(-1)[:, None].expand(weights.shape[:3])
    )
    close = {"rtol": 2e-4, "atol": 2e-5}
    torch.testing.assert_close(rows.max_weight[occupied].double(), weights.amax(-1)[occupied], **close)
    entropy = -torch.special.xlogy(weights, weights).sum(-1)
    if sinks is not None:
        sink = (1 - weights.sum(-1)).clamp(min=0)
        entropy = entropy - torch.special.xlogy(sink, sink)
        assert sink[occupied].mean() > 0.05  # the sink takes part
    torch.testing.assert_close(rows.entropy[occupied].double(), entropy[occupied], **close)
    on_sink = sink_mass(weights, seen[:, None]) + (0 if sinks is None else sink)
    torch.testing.assert_close(measurement.sink_mass[occupied].double(), on_sink[occupied], **close)


def main_output(outputs) -> torch.Tensor:
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state


def enable_checkpointing(model, use_reentrant):
    older = getattr(model, "gradient_checkpointing_enable", None)  # deprecated in favour of the other
    getattr(model, "activation_checkpointing_enable", older)({"use_reentrant": use_reentrant})
