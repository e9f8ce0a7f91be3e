"""Stand-ins for xformers, Transformer Engine and Megatron-Core, with the names and signatures of their public sources.

They compute in plain PyTorch. Nothing here uses hnf_attention.
"""

import math
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import torch
from flash_standins import each, packed
from torch import nn


def put_in_place(monkeypatch, name, **attributes):
    """A module of this name, importable until the test ends."""
    made = ModuleType(name)
    for attribute, value in attributes.items():
        setattr(made, attribute, value)
    parts = name.split(".")
    for count in range(1, len(parts)):
        outer = ".".join(parts[:count])
        if outer not in sys.modules:
            monkeypatch.setitem(sys.modules, outer, ModuleType(outer))
    monkeypatch.setitem(sys.modules, name, made)
    return made


# xformers


def _triangle(num_queries, num_keys, left=math.inf, right=0, bottom=True):
    diagonal = torch.arange(num_queries)[:, None] + (num_keys - num_queries if bottom else 0)
    j = torch.arange(num_keys)
    return (j <= diagonal + right) & (j >= diagonal - left)


def _bias(seen):
    return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)


class LowerTriangularMask:
    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        return _bias(_triangle(*shape[-2:], bottom=False)).to(dtype)


class LowerTriangularFromBottomRightMask:
    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        return _bias(_triangle(*shape[-2:])).to(dtype)


@dataclass
class LocalAttentionFromBottomRightMask:
    window_left: int
    window_right: int

    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        return _bias(_triangle(*shape[-2:], self.window_left, self.window_right)).to(dtype)


@dataclass
class SeqLenInfo:
    seqstart: torch.Tensor
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list

    @classmethod
    def from_starts(cls, starts):
        lengths = starts.diff()
        return cls(starts.int(), int(lengths.max()), int(lengths.min()), starts.tolist())


@dataclass
class BlockDiagonalMask:
    q_seqinfo: SeqLenInfo
    k_seqinfo: SeqLenInfo
    _batch_sizes: tuple | None = None

    def block(self, num_queries, num_keys):
        return torch.ones(num_queries, num_keys, dtype=torch.bool)

    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        seen = torch.zeros(shape[-2:], dtype=torch.bool)
        of_q, of_k = self.q_seqinfo.seqstart_py, self.k_seqinfo.seqstart_py
        for a, b, c, d in zip(of_q, of_q[1:], of_k, of_k[1:]):
            seen[a:b, c:d] = self.block(b - a, d - c)
        return _bias(seen).to(dtype)


@dataclass
class BlockDiagonalCausalMask(BlockDiagonalMask):
    def block(self, num_queries, num_keys):
        return _triangle(num_queries, num_keys, bottom=False)


@dataclass
class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    def block(self, num_queries, num_keys):
        return _triangle(num_queries, num_keys)


@dataclass
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    _window_size: int = 0

    def block(self, num_queries, num_keys):
        return _triangle(num_queries, num_keys, self._window_size - 1, bottom=False)


class PagedBlockDiagonalPaddedKeysMask(LowerTriangularMask):
    pass


def _attend(query, key, value, attn_bias, scale):
    shape = query.shape
    if query.dim() == 3:
        query, key, value = (x[:, :, None] for x in (query, key, value))
    if query.dim() == 5:
        query, key, value = (x.flatten(2, 3) for x in (query, key, value))
    scores = torch.einsum("bmhd,bnhd->bhmn", query, key) * (scale or query.shape[-1] ** -0.5)
    if isinstance(attn_bias, torch.Tensor):
        bias = attn_bias[:, None] if attn_bias.dim() == 3 else attn_bias
        scores = scores + bias
    elif attn_bias is not None:
        scores = scores + attn_bias.materialize(tuple(scores.shape[2:]))
    out = torch.einsum("bhmn,bnhd->bmhd", scores.softmax(-1).nan_to_num(0.0), value)
    return out.reshape(*shape[:-1], value.shape[-1]), scores.logsumexp(-1)


def memory_efficient_attention(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
):
    return _attend(query, key, value, attn_bias, scale)[0]


def memory_efficient_attention_forward_requires_grad(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
):
    return _attend(query, key, value, attn_bias, scale)


# Transformer Engine: of the parameters of its forward, those that are given to it here. The others are refused or
# change no score; `test_what_is_not_described_is_listed` gives one of them.


class DotProductAttention(nn.Module):
    """transformer_engine.pytorch.DotProductAttention: top left, unless "bottom_right" is said."""

    def __init__(
        self,
        heads,
        width,
        qkv_format="sbhd",
        attn_mask_type="causal",
        window_size=None,
        return_max_logit=False,
    ):
        super().__init__()
        self.qkv_format, self.attn_mask_type, self.window_size = qkv_format, attn_mask_type, window_size
        self.return_max_logit, self.softmax_offset, self.cp_group = return_max_logit, None, None
        self.unfused_attention = SimpleNamespace(softmax_scale=width**-0.5)
        self.error = 0.0

    def forward(
        self,
        query_layer=None,
        key_layer=None,
        value_layer=None,
        attention_mask=None,
        qkv_format=None,
        cu_seqlens_q=None,
        cu_seqlens_kv=None,
        max_seqlen_q=None,
        max_seqlen_kv=None,
        attn_mask_type=None,
        window_size=None,
        core_attention_bias_type="no_bias",
        core_attention_bias=None,
        inference_params=None,
        num_splits=1,
    ):
        layout, kind = qkv_format or self.qkv_format, attn_mask_type or self.attn_mask_type
        left, right = window_size or self.window_size or (-1, -1)
        scale = self.unfused_attention.softmax_scale
        if layout == "thd":
            shape = {"causal": "causal" in kind, "window": (left, right), "scale": scale}
            return packed(query_layer, key_layer, value_layer, cu_seqlens_q, cu_seqlens_kv, **shape)[
                0
            ].flatten(1)
        axes = (1, 2, 0, 3) if layout == "sbhd" else (0, 2, 1, 3)
        q, k, v = (x.permute(axes) for x in (query_layer, key_layer, value_layer))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) * scale
        if core_attention_bias is not None:
            scores = scores + core_attention_bias
        shape = scores.shape[2:]
        if "causal" in kind:
            far = math.inf if left < 0 else left
            scores = scores.masked_fill(~_triangle(*shape, far, 0, "bottom" in kind), -torch.inf)
        if "padding" in kind or kind == "arbitrary":
            scores = scores.masked_fill(attention_mask, -torch.inf)
        out = scores.softmax(-1).nan_to_num(0.0) @ v
        out = out.permute((2, 0, 1, 3) if layout == "sbhd" else (0, 2, 1, 3)).flatten(2)
        return (out, scores.amax((0, 2, 3)) + self.error) if self.return_max_logit else out


# Megatron-Core


class MegatronAttention(nn.Module):
    """megatron.core.transformer.dot_product_attention.DotProductAttention, its softmax in a kernel nobody sees."""

    def __init__(self, width, kind="causal", window=None, layer_scaling=None):
        super().__init__()
        self.softmax_scale = width**-0.5 / (layer_scaling or 1)
        self.attn_mask_type, self.softmax_offset = SimpleNamespace(name=kind), None
        self.scale_mask_softmax = SimpleNamespace(scale=layer_scaling, window_size=window)

    def forward(
        self,
        query,
        key,
        value,
        attention_mask,
        attn_mask_type=None,
        attention_bias=None,
        packed_seq_params=None,
    ):
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        window = self.scale_mask_softmax.window_size or (-1, -1)
        shape = {"causal": self.attn_mask_type.name == "causal", "window": window}
        if attention_mask is not None:
            keep = (~attention_mask[:, 0, 0]).nonzero()[:, 1].view(len(q), -1)
            k, v = (torch.stack([x[b][keep[b]] for b in range(len(q))]) for x in (k, v))
        scale = self.softmax_scale * (self.scale_mask_softmax.scale or 1)
        return each(q, k, v, scale=scale, **shape)[0].transpose(0, 1).flatten(2)
