"""What an attention design consists of."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Design:
    """One attention design. Lengths are in tokens.

    query_std, key_std: standard deviation of the projections' weights at initialisation.
    scale: factor of q.k, 1 / temperature T.
    layer_scale: factor of `scale` in each layer; empty means 1.
    qk_norm: q and k are normalised, with gains of 1.
    rotary: dimensions of a head that RoPE turns.
    interleaved: RoPE turns neighbouring dimensions together, rather than halves; None if not known.
    windows: visible keys of each layer; empty means all.
    correlation: mean cosine between the first layer's inputs of two tokens.
    spread: measured over predicted spread of the scores of each layer with random weights; the last number counts for
        all later layers; empty means 1.
    unused: names in a mapping of plain numbers that nothing asks for.
    sources: field -> where its number comes from: "config: NAME", "assumed: ...", "given", "derived: ...".
    """

    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_layers: int
    seq_len: int
    query_std: float
    key_std: float
    scale: float
    softcap: float | None = None
    qk_norm: bool = False
    rotary: int = 0
    interleaved: bool | None = None
    dtype: str = "float32"
    windows: tuple[int, ...] = field(default=(), repr=False)
    layer_scale: tuple[float, ...] = field(default=(), repr=False)
    correlation: float = 0.0
    spread: tuple[float, ...] = field(default=(), repr=False)
    sources: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    unused: tuple[str, ...] = field(default=(), compare=False, repr=False)

    def keys(self, layer: int) -> int:
        """Visible keys of the last query of a layer."""
        return min(self.seq_len, self.windows[layer]) if self.windows else self.seq_len

    def scale_of(self, layer: int) -> float:
        return self.scale * (self.layer_scale[layer] if self.layer_scale else 1.0)

    def spread_of(self, layer: int) -> float:
        return self.spread[min(layer, len(self.spread) - 1)] if self.spread else 1.0

    def kind_of(self, layer: int) -> tuple[int, float, float]:
        """All that sets a layer apart: layers of one kind have the same numbers."""
        return self.keys(layer), self.scale_of(layer), self.spread_of(layer)

    @property
    def temperature(self) -> float:
        return 1.0 / self.scale

    @property
    def relative_temperature(self) -> float:
        """T / sqrt(head_dim): 1 is usual."""
        return self.temperature / math.sqrt(self.head_dim)

    def at_temperature(self, relative: float) -> Design:
        """The same design at another T / sqrt(head_dim)."""
        return replace(self, scale=1.0 / (relative * math.sqrt(self.head_dim)))

    def with_heads(self, n_heads: int) -> Design:
        """The same width in another number of heads, at the same relative temperature and grouping."""
        kv = max(1, n_heads * self.n_kv_heads // self.n_heads)
        return replace(self._resized(self.d_model, n_heads), n_kv_heads=kv)

    def with_width(self, d_model: int) -> Design:
        """Another width in the same number of heads, at the same relative temperature."""
        return self._resized(d_model, self.n_heads)

    def _resized(self, d_model: int, n_heads: int) -> Design:
        head_dim = d_model // n_heads
        scale = self.scale * math.sqrt(self.head_dim / head_dim)
        return replace(self, d_model=d_model, n_heads=n_heads, head_dim=head_dim, scale=scale)


def positive(what: str, value: Any) -> float:
    """The value as a float. Raises ValueError unless it is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"expected {what} to be a finite number above 0, got {value!r}")
    return float(value)
