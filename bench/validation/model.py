"""The model of one recipe as anybody would write it, in plain modules: what the fixes are tried on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .recipes import Recipe
from .text import VOCABULARY


def rotary(context: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE, (context, head_dim) each."""
    turns = 10_000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.arange(context)[:, None] * torch.cat([turns, turns])
    return angles.cos(), angles.sin()


def rotate(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE of (..., N, D)."""
    first, second = x.chunk(2, -1)
    return x * turns[0].to(x.dtype) + torch.cat([-second, first], -1) * turns[1].to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with separate projections."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        width, self.head_dim = recipe.width, recipe.head_dim
        self.scale = recipe.sharpness * recipe.head_dim**-0.5
        self.grouped = recipe.kv_heads != recipe.heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, recipe.kv_heads * recipe.head_dim, bias=False)
        self.v_proj = nn.Linear(width, recipe.kv_heads * recipe.head_dim, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        if recipe.qk_norm:
            self.q_norm = nn.RMSNorm(recipe.head_dim, eps=1e-6)
            self.k_norm = nn.RMSNorm(recipe.head_dim, eps=1e-6)
        self.normed = recipe.qk_norm
        if recipe.positions == "rope":
            cosines, sines = rotary(recipe.context, recipe.head_dim)
            self.register_buffer("cosines", cosines, persistent=False)
            self.register_buffer("sines", sines, persistent=False)
        self.rope = recipe.positions == "rope"

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.normed:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if self.rope:
            turns = self.cosines[: x.shape[1]], self.sines[: x.shape[1]]
            q, k = rotate(q, turns), rotate(k, turns)
        mixed = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=self.grouped
        )
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """GELU beside LayerNorm, SwiGLU beside RMSNorm."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        width = recipe.width
        self.gated = recipe.norm == "rms"
        self.up_proj = nn.Linear(width, 4 * width, bias=False)
        self.down_proj = nn.Linear(2 * width if self.gated else 4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up_proj(x)
        if self.gated:
            gate, x = x.chunk(2, -1)
            return self.down_proj(F.silu(gate) * x)
        return self.down_proj(F.gelu(x))


def norm_layer(recipe: Recipe) -> nn.Module:
    return nn.RMSNorm(recipe.width, eps=1e-6) if recipe.norm == "rms" else nn.LayerNorm(recipe.width)


class Block(nn.Module):
    """A pre-norm layer."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = norm_layer(recipe), norm_layer(recipe)
        self.attention, self.mlp = Attention(recipe), Mlp(recipe)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Pre-norm decoder: bytes (B, N) to logits (B, N, 256). Its weights follow from the recipe's seed."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.logit_scale = recipe.logit_scale
        self.bytes = nn.Embedding(VOCABULARY, recipe.width)
        learned = recipe.positions == "learned"
        self.positions = nn.Embedding(recipe.context, recipe.width) if learned else None
        self.blocks = nn.ModuleList(Block(recipe) for _ in range(recipe.depth))
        self.norm = norm_layer(recipe)
        self.head = nn.Linear(recipe.width, VOCABULARY, bias=False)
        generator = torch.Generator().manual_seed(recipe.seed)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02 * recipe.init, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.bytes(x)
        if self.positions is not None:
            hidden = hidden + self.positions.weight[: x.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden)) * self.logit_scale
