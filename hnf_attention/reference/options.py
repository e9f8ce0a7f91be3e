"""What shapes the scores of an attention call, beside its queries and keys."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Options(NamedTuple):
    """Validated and normalised: `attn_mask` (B, H, M, N) broadcastable or None, `scale` a number, `seqlens` on
    the query's device. See `attention` for what each of them means.
    """

    attn_mask: Tensor | None
    is_causal: bool
    scale: float
    window_size: int | None
    softcap: float | None
    sinks: Tensor | None
    seqlens: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether nothing but `is_causal` and `scale` shapes the scores."""
        others = self.attn_mask is self.window_size is self.softcap is self.sinks is None
        return others and self.seqlens is None
