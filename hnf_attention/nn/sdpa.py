"""`torch.nn.functional.scaled_dot_product_attention` as a module that keeps the statistics of what it computed."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..instrumentation.handed_over import Extra, Given, attend
from ..instrumentation.interceptors.sdpa import four_dimensional
from ..statistics.checks import expected
from ..statistics.rows import RowStats
from . import rows

_EXTRA = Extra(interceptor="hnf_attention.nn.ScaledDotProductAttention")


class ScaledDotProductAttention(nn.Module):
    """`torch.nn.functional.scaled_dot_product_attention` as a module without parameters, and its row statistics.

    Output and statistics come from one pass. PyTorch computes the output of calls with dropout, and of all calls while
    its fused kernels are turned off; the statistics are then taken beside it.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """As `scaled_dot_product_attention`: query (..., H, M, D), key (..., H_kv, N, D), value (..., H_kv, N, D_v).

        Leading sizes broadcast. attn_mask and is_causal may be given together: a key is then visible if both show it.
        An additive mask hides a key with -inf, or with a number below half the smallest one of its dtype. A row without
        a visible key gives 0. dropout_p applies in training and evaluation, as in PyTorch.
        Raises ValueError or TypeError for shapes and dtypes that do not fit.
        """
        if not isinstance(query, Tensor) or not isinstance(key, Tensor) or not isinstance(value, Tensor):
            got = [type(x).__name__ for x in (query, key, value)]
            raise expected("query, key and value to be tensors", ", ".join(got), TypeError)
        dims = query.dim(), key.dim(), value.dim()
        if dims[0] < 2 or len(set(dims)) > 1:
            raise expected("query, key and value with as many dimensions, 2 or more", list(dims))
        if not 0 <= dropout_p < 1:
            raise expected("dropout_p from 0 to below 1", dropout_p)
        given = Given(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if given.odd and not torch.compiler.is_compiling():
            return attend(given, _EXTRA, partial(rows.keep, self))
        query, key, value, attn_mask, shape = four_dimensional(query, key, value, attn_mask)
        heads = query.shape[1], key.shape[1]
        if not enable_gqa and heads[0] != heads[1]:
            if 1 not in heads:
                raise expected(
                    "enable_gqa=True for grouped heads", f"{heads[0]} query and {heads[1]} key heads"
                )
            query, key, value = (x.expand(-1, max(heads), -1, -1) for x in (query, key, value))
        given = Given(query, key, value, attn_mask, dropout_p, is_causal, scale)
        out = attend(given, _EXTRA, partial(rows.keep, self))
        return out if len(shape) == 3 else out.reshape(*shape, out.shape[-1])

    @property
    def row_stats(self) -> RowStats | None:
        """As `hnf_attention.nn.row_stats`. All leading sizes are one batch dimension, and 2-D input has one head."""
        return rows.row_stats(self)
