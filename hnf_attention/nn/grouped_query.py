"""Causal self-attention with grouped queries, as decoders of today have it, and its row statistics."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..instrumentation.handed_over import Extra, Given, attend
from ..statistics.checks import expected
from ..statistics.rows import RowStats
from . import cached, rotary, rows
from .cached import KeyValueCache
from .rotary import Rope

_ROPE = Rope()


class QKNorm(NamedTuple):
    """RMS norm of each head's queries and keys (arXiv 2302.05442, section 2) before they turn.

    eps: added to the mean square. unit_offset: the gain is 1 + weight, as Gemma keeps it.
    """

    eps: float = 1e-6
    unit_offset: bool = False


class HeadNorm(nn.Module):
    """The RMS norm over the last dimension, computed in fp32. weight: (head_dim,)."""

    def __init__(
        self,
        head_dim: int,
        norm: QKNorm,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.norm = norm
        start = torch.zeros if norm.unit_offset else torch.ones
        self.weight = nn.Parameter(start(head_dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x, normed, in its dtype."""
        wide = x if x.dtype == torch.float64 else x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.norm.eps)
        if self.norm.unit_offset:
            return (wide * (1 + self.weight.to(wide.dtype))).to(x.dtype)
        return self.weight * wide.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.norm.eps:g}, unit_offset={self.norm.unit_offset}"


class GroupedQueryAttention(nn.Module):
    """Self-attention of a decoder: projections, QK-norm, rotary positions, attention, output projection.

    Its parameters (`q_proj`, `k_proj`, `v_proj`, `o_proj`, `q_norm`, `k_norm`, `sinks`) have the names and layouts
    of transformers' LLaMA, Mistral, Qwen 2 and 3, Gemma 1 to 3 and gpt-oss attention, so state dicts go both ways.

    embed_dim: of the input. num_heads, num_kv_heads: of queries, and of keys and values, a divisor of it; as many by
        default. head_dim: embed_dim / num_heads by default.
    bias, out_bias: of the three input projections, and of the output projection; it follows `bias` by default.
    rope: rotary positions; None for none.
    qk_norm: norms each head of queries and keys; None for no norm.
    softcap, window_size: as `hnf_attention.attention` takes them. scale: of q.k; head_dim ** -0.5 by default.
    sinks: a learned sink logit for each head (gpt-oss).
    dropout: of the attention weights in training. With a soft-cap, a window or sinks it takes memory for all weights.

    Raises ValueError for sizes that do not fit, and for options out of their range.
    """

    sinks: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
        rope: Rope | None = _ROPE,
        qk_norm: QKNorm | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        window_size: int | None = None,
        dropout: float = 0.0,
        scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if min(embed_dim, num_heads, num_kv_heads) < 1 or num_heads % num_kv_heads:
            got = f"embed_dim={embed_dim}, num_heads={num_heads}, num_kv_heads={num_kv_heads}"
            raise expected("sizes >= 1, and num_heads a multiple of num_kv_heads", got)
        if head_dim is None:
            if embed_dim % num_heads:
                raise expected(f"embed_dim a multiple of num_heads={num_heads}, or a head_dim", embed_dim)
            head_dim = embed_dim // num_heads
        turned = 0 if rope is None else head_dim if rope.dim is None else rope.dim
        if head_dim < 1 or turned % 2 or not 0 <= turned <= head_dim:
            raise expected(
                f"head_dim >= 1 and an even number of at most {head_dim} turned dimensions",
                f"head_dim={head_dim}, {turned} turned",
            )
        if not 0 <= dropout < 1:
            raise expected("dropout from 0 to below 1", dropout)
        if softcap is not None and not softcap > 0:
            raise expected("softcap > 0 or None", softcap)
        if window_size is not None and window_size < 1:
            raise expected("window_size >= 1 or None", window_size)
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, num_kv_heads
        self.head_dim, self.rope, self.dropout, self.scale = head_dim, rope, dropout, scale
        self.softcap, self.window_size = softcap, window_size
        linear = partial(nn.Linear, device=device, dtype=dtype)
        self.q_proj = linear(embed_dim, num_heads * head_dim, bias)
        self.k_proj = linear(embed_dim, num_kv_heads * head_dim, bias)
        self.v_proj = linear(embed_dim, num_kv_heads * head_dim, bias)
        self.o_proj = linear(num_heads * head_dim, embed_dim, bias if out_bias is None else out_bias)
        if qk_norm is not None:
            self.q_norm = HeadNorm(head_dim, qk_norm, device, dtype)
            self.k_norm = HeadNorm(head_dim, qk_norm, device, dtype)
        self.has_qk_norm = qk_norm is not None
        zeros = torch.zeros(num_heads, device=device, dtype=dtype) if sinks else None
        self.register_parameter("sinks", None if zeros is None else nn.Parameter(zeros))

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        *,
        is_causal: bool = True,
        positions: Tensor | None = None,
        rotary_tables: tuple[Tensor, Tensor] | None = None,
        past_key_values: KeyValueCache | None = None,
        layer_idx: int = 0,
    ) -> Tensor:
        """The output (B, M, embed_dim) for x (B, M, embed_dim).

        attn_mask: boolean (True = attend) or additive, broadcastable to (B, num_heads, M, N); it combines with
            is_causal and the window. N: the keys, M without a cache.
        positions: int (M,) or (B, M). By default they go on from the tokens in the cache, and begin at 0 without one.
            They turn queries and keys; what a query sees follows from the places in x and in the cache.
        rotary_tables: cosines and sines, (M or B x M, width), in place of those that `rope` makes, as for scaled
            positions (YaRN, LLaMA 3). width: the turned dimensions, or half of them.
        past_key_values: a cache of transformers, or another `KeyValueCache`. It takes in the keys and values of x, and
            x attends to all that it keeps. `row_stats` are those of x. layer_idx: the number of this layer in it.
        Raises ValueError or TypeError for arguments that do not fit.
        """
        if x.dim() != 3 or x.shape[2] != self.embed_dim:
            raise expected(f"x of shape (batch, length, {self.embed_dim})", tuple(x.shape))
        if self.rope is None and not (positions is None and rotary_tables is None):
            raise expected("no positions and no rotary tables without rope", "some")
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        past = cached.length(past_key_values, layer_idx)
        if self.has_qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.rope is not None:
            cosine, sine = (
                self._tables(x, positions, past) if rotary_tables is None else self._once(rotary_tables)
            )
            query, key = rotary.rotate(query, cosine, sine), rotary.rotate(key, cosine, sine)
        seen = cached.Seen(attn_mask, is_causal, self.window_size)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, layer_idx)
            seen = cached.seen(past, (query.shape[2], key.shape[2]), x.device, seen)
            key, value = key[:, :, seen.first :], value[:, :, seen.first :]
        extra = Extra(seen.window_size, self.softcap, self.sinks, "hnf_attention.nn.GroupedQueryAttention")
        dropout_p = self.dropout if self.training else 0.0
        given = Given(query, key, value, seen.attn_mask, dropout_p, seen.is_causal, self.scale)
        out = attend(given, extra, partial(rows.keep, self))
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _tables(self, x: Tensor, positions: Tensor | None, past: int | Tensor) -> tuple[Tensor, Tensor]:
        length = x.shape[1]
        if positions is None:
            positions = torch.arange(length, device=x.device) + past
        if tuple(positions.shape) not in ((length,), (x.shape[0], length), (1, length)):
            raise expected(f"positions of shape ({length},) or {tuple(x.shape[:2])}", tuple(positions.shape))
        return rotary.tables(self.rope or _ROPE, positions, self.head_dim)

    def _once(self, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Tables with each angle once: transformers repeats them in the second half."""
        turned = (self.rope or _ROPE).dim or self.head_dim
        widths = {x.shape[-1] for x in given}
        if widths == {turned}:
            return given[0][..., : turned // 2], given[1][..., : turned // 2]
        if widths != {turned // 2}:
            raise expected(f"rotary tables of width {turned} or {turned // 2}", sorted(widths))
        return given

    @property
    def row_stats(self) -> RowStats | None:
        """As `hnf_attention.nn.row_stats`."""
        return rows.row_stats(self)

    def extra_repr(self) -> str:
        shown = {
            "head_dim": self.head_dim,
            "rope": self.rope,
            "softcap": self.softcap,
            "window_size": self.window_size,
            "dropout": self.dropout or None,
            "scale": self.scale,
        }
        options = "".join(f", {name}={value}" for name, value in shown.items() if value is not None)
        return f"{self.embed_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}{options}"
