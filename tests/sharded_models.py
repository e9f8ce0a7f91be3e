"""Models that are split over processes, and what they are fed."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from attention_models import Model
from torch import nn

WIDTH, HEADS, LENGTH = 16, 4, 40
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "ring_attention.py"
REAL = torch.arange(LENGTH) < torch.arange(LENGTH - 7, LENGTH + 1)[:, None]  # of INPUTS, the rest is padding
INPUTS = torch.randn(8, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
LLAMA = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
)
QKV = torch.randn(3, 4, HEADS, 16, 8, generator=torch.Generator().manual_seed(3)).unbind()
BROKEN = [*QKV[:2], QKV[2].clone()]  # a NaN in a value
BROKEN[2][1, 2, 5, 0] = torch.nan
MASK = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(4))
TOKENS = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(2))


def sharp_model(**options):
    """Two blocks with fused projections; scores of the first are far too large."""
    torch.manual_seed(0)
    model = Model(**options)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.mul_(30.0)
    return model


class SeparateAttention(nn.Module):
    """Causal, with separate projections, and as many heads as this process's projections hold."""

    def __init__(self):
        super().__init__()
        self.head_dim = WIDTH // HEADS
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH))
            nn.init.normal_(getattr(self, name).weight, std=0.25)

    def split(self, x):
        projections = (self.q_proj, self.k_proj, self.v_proj)
        return (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in projections)

    def forward(self, x):
        out = F.scaled_dot_product_attention(*self.split(x), is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class GatheringAttention(SeparateAttention):
    """Context parallel: this process's queries against the keys of all. rows: the positions of its tokens.

    real: which keys are no padding, boolean (B, N); None for all.
    """

    rows = group = real = None

    def forward(self, x):
        q, k, v = self.split(x)
        rows = torch.arange(x.shape[1])
        if self.group is not None:
            rows, all_rows = self.rows, _all(self.rows, self.group, 0)
            k, v = (_all(y, self.group, 2)[:, :, all_rows.argsort()] for y in (k, v))
        mask = rows[:, None] >= torch.arange(k.shape[2])
        if self.real is not None:
            mask = mask & self.real[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class PartedAttention(SeparateAttention):
    """What the processes of GatheringAttention compute, in one: the queries of each are a batch element."""

    def forward(self, x):
        q, k, v = self.split(x)
        rows = torch.stack([zigzag(rank, 2) for rank in range(2)])
        q = q[:, :, rows].transpose(1, 2).flatten(0, 1)
        k, v = (y.repeat_interleave(2, 0) for y in (k, v))
        mask = rows[:, None, :, None] >= torch.arange(x.shape[1])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat(len(x), 1, 1, 1))
        out = out.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2, 3)[:, :, rows.flatten().argsort()]
        return self.o_proj(out.transpose(1, 2).flatten(2))


def _all(x, group, dim):
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, x.detach().contiguous(), group=group)
    return torch.cat(parts, dim)


def zigzag(rank, size, length=LENGTH):
    """Of 2 x size pieces of the sequence, one from its beginning and one from its end."""
    pieces = torch.arange(length).chunk(2 * size)
    return torch.cat([pieces[rank], pieces[-1 - rank]])


def stack(attention=SeparateAttention):
    """Two attention layers, one after the other."""
    torch.manual_seed(0)
    return nn.Sequential(attention(), attention())


class FusedAttention(nn.Module):
    """Causal, with one projection whose rows are ordered by queries, keys and values first, or by heads first."""

    def __init__(self, name, projection, by_head=False):
        super().__init__()
        self.name, self.by_head = name, by_head
        self.add_module(name, projection)

    def forward(self, x):
        fused = self.get_submodule(self.name)(x)
        if self.by_head:
            q, k, v = fused.unflatten(-1, (HEADS, 3, -1)).permute(3, 0, 2, 1, 4)
        else:
            q, k, v = fused.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class GPTNeoXAttention(FusedAttention):
    """Its name tells the order of its rows."""

    def __init__(self):
        super().__init__("query_key_value", nn.Linear(WIDTH, 3 * WIDTH), by_head=True)


class Layouts(nn.Module):
    """A layer for each layout of query and key weights that can be found in shards."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        self.separate = SeparateAttention()
        self.fused = FusedAttention("qkv", nn.Linear(WIDTH, 3 * WIDTH))
        self.turned = FusedAttention("c_attn", Conv1D(3 * WIDTH, WIDTH))
        self.multihead = nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True)
        self.interleaved = GPTNeoXAttention()
        self.low = SeparateAttention().bfloat16()


CLIP = {
    "action": "qk_clip",
    "threshold": 30.0,
    "layers": {
        name: [100.0, 20.0, None, 31.0]
        for name in ("separate", "fused", "turned", "multihead", "interleaved", "low")
    },
}
