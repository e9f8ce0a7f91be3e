"""An attention call whose queries and keys have the lengths that learned gains say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .shards import own_part

QUERY, KEY = "qk_norm_query", "qk_norm_key"  # names of the gains in a module's state dict
EPS = 1e-6


class QKNorm:
    """The change of one module's call. Its gains are parameters of the module: query (H,), key (H_kv,), fp32."""

    name, sdpa_only, optional, dropout = "QK-norm", False, False, True

    def run(
        self,
        module: nn.Module,
        attend: Callable[..., Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *rest: Any,
        **named: Any,
    ) -> Any:
        """Attend with queries and keys whose root mean square is their head's gain."""
        query = _normed(query, own_part(module.get_parameter(QUERY)))
        return attend(query, _normed(key, own_part(module.get_parameter(KEY))), value, *rest, **named)


def _normed(x: Tensor, gain: Tensor) -> Tensor:
    if x.shape[1] != len(gain):
        x, rows = _regrouped(x, len(gain))
        return _regrouped(_normed(x, gain), rows)[0]
    return (F.rms_norm(x, x.shape[-1:], eps=EPS) * gain.view(-1, 1, 1).to(x.dtype)).to(x.dtype)


def _regrouped(x: Tensor, heads: int) -> tuple[Tensor, int]:
    """(B, heads, any, D) of (B, others, any, D): key heads that were repeated, or query heads packed into rows."""
    return x.reshape(x.shape[0], heads, -1, x.shape[3]), x.shape[1]
