"""Small models that call scaled_dot_product_attention, or do not, as people write them."""

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch import softmax as softmax_by_name
from torch.nn.functional import scaled_dot_product_attention as sdpa_by_name
from torch.utils.checkpoint import checkpoint

LAYERS = ["blocks.0.attn", "blocks.1.attn"]


class Attention(nn.Module):
    """Self-attention as people write it, with the keyword arguments of SDPA to be chosen."""

    def __init__(self, width=16, heads=4, **options):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        nn.init.normal_(self.qkv.weight, std=0.6)
        self.heads, self.options = heads, options

    def split(self, x):
        return (y.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for y in self.qkv(x).chunk(3, -1))

    def forward(self, x):
        q, k, v = self.split(x)
        out = F.scaled_dot_product_attention(q, k, v, **self.options)
        return out.transpose(-2, -3).flatten(-2)


class Block(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attn = Attention(**options)
        self.mlp = nn.Sequential(nn.Linear(16, 16), nn.Tanh())

    def forward(self, x):
        return x + self.mlp(x + self.attn(x))


class Model(nn.Module):
    def __init__(self, use_reentrant=None, **options):
        super().__init__()
        self.blocks = nn.ModuleList([Block(**options) for _ in range(2)])
        self.use_reentrant = use_reentrant

    def forward(self, x):
        for block in self.blocks:
            run = block
            if self.use_reentrant is not None:
                run = functools.partial(checkpoint, block, use_reentrant=self.use_reentrant)
            x = run(x)
        return x


class HandWrittenAttention(Attention):
    def forward(self, x):
        q, k, v = self.split(x)
        out = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        return out.transpose(-2, -3).flatten(-2)


class ByNameAttention(Attention):
    """Calls what its file imported by name: SDPA, or softmax where it writes attention out."""

    def forward(self, x):
        q, k, v = self.split(x)
        if self.options.get("by_hand"):
            out = softmax_by_name(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v
        else:
            out = sdpa_by_name(q, k, v)
        return out.transpose(-2, -3).flatten(-2)


class LinearAttention(Attention):
    """Attention without a softmax: there is nothing to measure."""

    def forward(self, x):
        q, k, v = self.split(x)
        out = q.relu() @ (k.relu().transpose(-1, -2) @ v)
        return out.transpose(-2, -3).flatten(-2)


class Direct(nn.Module):
    """Calls SDPA with the very tensors it is given."""

    def forward(self, *tensors, **options):
        return F.scaled_dot_product_attention(*tensors, **options)


def x(*shape, **options):
    return torch.randn(*(shape or (2, 20, 16)), **options)
