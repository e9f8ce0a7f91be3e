"""Small models into which `triage_causes` puts faults: GPT-2, LLaMA and BERT, and a GPT with parts that can fail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS, HEADS, WIDTH, LENGTH, VOCABULARY, BATCH = 3, 4, 32, 12, 40, 2
HEAD_DIM = WIDTH // HEADS


def device() -> str:
    """The kind of device that tensors are made on."""
    return torch.get_default_device().type


class Attention(nn.Module):
    """Attention that is written out, by the softmax of the user's choice; `bias` is added to the scores."""

    def __init__(self, softmax: str):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.softmax, self.num_heads = softmax, HEADS
        self.gradient: tuple[int, float] | None = None  # (head, factor of its gradient)
        self.register_buffer("bias", torch.zeros(1, HEADS, LENGTH, LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        if self.gradient is not None:
            head, factor = self.gradient
            factors = torch.ones(1, HEADS, 1, 1)
            factors[:, head] = factor
            q = ScaledGradient.apply(q, factors.to(q))
        if self.softmax == "kernel":
            out = torch.ops.triage_bench.attention(q, k, v)[0]
        else:
            future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
            scores = q @ k.transpose(-1, -2) * HEAD_DIM**-0.5 + self.bias.to(q.dtype)
            scores = scores.masked_fill(future, -torch.inf)
            if self.softmax == "naive":
                powers = scores.exp()
                weights = powers / powers.sum(-1, keepdim=True)
            else:
                weights = scores.softmax(-1)
            out = weights @ v
        return self.out(out.transpose(1, 2).flatten(2))


class ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(factors)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.saved_tensors[0], None


class Block(nn.Module):
    def __init__(self, softmax: str):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), Attention(softmax)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class PlainGPT(nn.Module):
    """softmax: "torch", "naive" (exp / sum without the maximum), or "kernel" (a faulty one of this file)."""

    def __init__(self, softmax: str = "torch"):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(softmax) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1).float(), labels.flatten())


#: (head, "forward" or "backward"): where the kernel below is at fault.
fault: list[tuple[int, str]] = []


@torch.library.custom_op("triage_bench::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention and its lse, whose kernel may give NaN for one head of finite statistics."""
    future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.transpose(-1, -2) * q.shape[3] ** -0.5).masked_fill(future, -torch.inf)
    out = scores.softmax(-1) @ v
    for head, where in fault:
        if where == "forward":
            out[1, head, 3] = torch.nan
    return out, scores.logsumexp(-1)


@torch.library.custom_op("triage_bench::attention_backward", mutates_args=())
def attention_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """The gradients of q, k and v."""
    future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    scale = q.shape[3] ** -0.5
    p = (q @ k.transpose(-1, -2) * scale).masked_fill(future, -torch.inf).softmax(-1)
    dp = grad_out @ v.transpose(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    gradients = [ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad_out]
    for head, where in fault:
        if where == "backward":
            gradients[0][0, head, 2] = torch.inf
    return gradients


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_out: Tensor, _grad_lse: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.ops.triage_bench.attention_backward(grad_out, *ctx.saved_tensors))


attention.register_autograd(_backward, setup_context=_save)


@dataclass
class Setup:
    """A model with a batch. names: of its blocks' parts by their role, with {} for the number of the layer."""

    model: nn.Module
    inputs: dict[str, Tensor]
    names: dict[str, str]
    dtype: str = "float32"  # of the weights, or "autocast float16" and the like
    optimizer: torch.optim.Optimizer | None = None
    scaler: torch.amp.GradScaler | None = None
    loss: Any = None

    def run(self) -> Any:
        if not self.dtype.startswith("autocast"):
            return self.model(**self.inputs)
        with torch.autocast(device(), getattr(torch, self.dtype.split()[1])):
            return self.model(**self.inputs)

    def module(self, role: str, layer: int) -> nn.Module:
        return self.model.get_submodule(self.names[role].format(layer))

    def name(self, role: str, layer: int) -> str:
        return self.names[role].format(layer)


NAMES = {
    "gpt2": {
        "layer": "transformer.h.{}.attn",
        "query": "transformer.h.{}.attn.c_attn",
        "out": "transformer.h.{}.attn.c_proj",
        "mlp": "transformer.h.{}.mlp.c_fc",
        "norm": "transformer.h.{}.ln_1",
        "embed": "transformer.wte",
        "head": "lm_head",
    },
    "llama": {
        "layer": "model.layers.{}.self_attn",
        "query": "model.layers.{}.self_attn.q_proj",
        "key": "model.layers.{}.self_attn.k_proj",
        "value": "model.layers.{}.self_attn.v_proj",
        "out": "model.layers.{}.self_attn.o_proj",
        "mlp": "model.layers.{}.mlp.up_proj",
        "norm": "model.layers.{}.input_layernorm",
        "embed": "model.embed_tokens",
        "head": "lm_head",
    },
    "bert": {
        "layer": "bert.encoder.layer.{}.attention.self",
        "query": "bert.encoder.layer.{}.attention.self.query",
        "key": "bert.encoder.layer.{}.attention.self.key",
        "value": "bert.encoder.layer.{}.attention.self.value",
        "out": "bert.encoder.layer.{}.attention.output.dense",
        "mlp": "bert.encoder.layer.{}.intermediate.dense",
        "norm": "bert.encoder.layer.{}.output.LayerNorm",
        "embed": "bert.embeddings.word_embeddings",
        "head": "cls.predictions.decoder",
    },
    "plain": {
        "layer": "blocks.{}.attention",
        "query": "blocks.{}.attention.query",
        "key": "blocks.{}.attention.key",
        "value": "blocks.{}.attention.value",
        "out": "blocks.{}.attention.out",
        "mlp": "blocks.{}.mlp.1",
        "norm": "blocks.{}.norm",
        "embed": "embed",
        "head": "head",
    },
}


def setup(
    family: str, implementation: str = "eager", dtype: str = "float32", softmax: str = "torch"
) -> Setup:
    """A model with random weights of the family, and a batch."""
    torch.manual_seed(0)
    fault.clear()
    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    model = _transformers(family, implementation) if family != "plain" else PlainGPT(softmax)
    if not dtype.startswith("autocast"):
        model = model.to(getattr(torch, dtype))
    return Setup(model.train(), {"input_ids": ids, "labels": ids.clone()}, NAMES[family], dtype)


def _transformers(family: str, implementation: str) -> nn.Module:
    import transformers

    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "attn_implementation": implementation}
    tokens: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if family == "gpt2":
        dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.0}
        sizes |= {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": HEADS, "n_positions": LENGTH}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **tokens, **dropout))
    sizes |= {"num_hidden_layers": LAYERS, "hidden_size": WIDTH, "num_attention_heads": HEADS}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": LENGTH}
    if family == "llama":
        config = transformers.LlamaConfig(num_key_value_heads=2, tie_word_embeddings=False, **sizes, **tokens)
        return transformers.LlamaForCausalLM(config)
    dropout = {"attention_probs_dropout_prob": 0.0}
    return transformers.BertForMaskedLM(
        transformers.BertConfig(**sizes, **(tokens | {"pad_token_id": 0}), **dropout)
    )
