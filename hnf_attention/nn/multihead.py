"""A drop-in for `torch.nn.MultiheadAttention` that computes by itself and keeps the statistics of what it computed."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..instrumentation.handed_over import Extra, Given, attend, attend_with_weights
from ..statistics.checks import expected
from ..statistics.rows import RowStats
from . import rows

_EXTRA = Extra(interceptor="hnf_attention.nn.MultiheadAttention")


class _Sizes(NamedTuple):
    """Of one call: the batch is 1 for unbatched input."""

    batch: int
    queries: int
    keys: int


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention`: same constructor, arguments, results and state dict, both ways.

    Without need_weights and dropout the output comes from the same pass as the statistics. PyTorch computes the output
    of calls with dropout, and of all calls while its fused kernels are turned off; attention weights are computed
    beside the statistics, too. A query whose keys are all hidden gives 0, also with weights.

    PyTorch's inference fast path is not used. In inference, nn.TransformerEncoderLayer may call one C++ function for
    its whole layer, which passes this module by: `row_stats` then stays as it was, unless the model is instrumented.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `torch.nn.MultiheadAttention.forward`. Raises what that raises, for wrong sizes and dtypes."""
        if query.is_nested or key.is_nested or value.is_nested:
            rows.keep(self, None)
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        sizes = self._checked(query, key, value, key_padding_mask, attn_mask, is_causal)
        batched = query.dim() == 3
        query, key, value = (self._by_head(x, batched) for x in self._projected(query, key, value))
        key, value = self._with_added_keys(key, value)
        added = key.shape[2] - sizes.keys
        if is_causal and key_padding_mask is None and not need_weights:
            mask = None  # the hint says what is in it
        else:
            is_causal = False
            mask = self._mask(attn_mask, key_padding_mask, sizes, added, query.dtype)
        dropout_p = self.dropout if self.training else 0.0
        given = Given(query, key, value, mask, dropout_p, is_causal)
        weights = None
        if need_weights:
            out, weights = attend_with_weights(given, _EXTRA, partial(rows.keep, self))
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        else:
            out = attend(given, _EXTRA, partial(rows.keep, self))
        order = (0, 2, 1, 3) if self.batch_first or not batched else (2, 0, 1, 3)
        out = out.permute(order).flatten(2)
        out = functional.linear(out, self.out_proj.weight, self.out_proj.bias)
        return out if batched else out[0], weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        bias, width = self.in_proj_bias, self.embed_dim
        if self.in_proj_weight is None:
            weights: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            return functional.linear(query, self.in_proj_weight, bias).split(width, -1)
        elif key is value:
            of_query, rest = self.in_proj_weight.split([width, 2 * width])
            biases: Any = (None, None) if bias is None else bias.split([width, 2 * width])
            both = functional.linear(key, rest, biases[1]).split(width, -1)
            return functional.linear(query, of_query, biases[0]), *both
        else:
            weights = self.in_proj_weight.split(width)
        biases = (None,) * 3 if bias is None else bias.split(width)
        return tuple(map(functional.linear, (query, key, value), weights, biases))

    def _by_head(self, x: Tensor, batched: bool) -> Tensor:
        """(B, H, length, D) of a projection."""
        x = (x if batched else x[None]).unflatten(-1, (self.num_heads, self.head_dim))
        return x.permute((0, 2, 1, 3) if self.batch_first or not batched else (1, 2, 0, 3))

    def _with_added_keys(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values with those that add_bias_kv and add_zero_attn append."""
        if self.bias_k is not None and self.bias_v is not None:
            key, value = (
                torch.cat(
                    [x, bias.view(1, self.num_heads, 1, self.head_dim).to(x.dtype).expand_as(x[:, :, :1])], 2
                )
                for x, bias in ((key, self.bias_k), (value, self.bias_v))
            )
        if self.add_zero_attn:
            key, value = (functional.pad(x, (0, 0, 0, 1)) for x in (key, value))
        return key, value

    def _mask(
        self,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        sizes: _Sizes,
        added: int,
        dtype: torch.dtype,
    ) -> Tensor | None:
        """One mask as `attention` takes it, for the appended keys too; None for no masks."""
        masks = []
        if attn_mask is not None:
            by_head = attn_mask.dim() == 3
            masks.append(
                attn_mask.unflatten(0, (sizes.batch, self.num_heads)) if by_head else attn_mask[None, None]
            )
        if key_padding_mask is not None:
            masks.append(key_padding_mask.view(sizes.batch, 1, 1, sizes.keys))
        if not masks:
            return None
        if all(mask.dtype == torch.bool for mask in masks):
            seen = ~masks[0] if len(masks) == 1 else ~(masks[0] | masks[1])
            return functional.pad(seen, (0, added), value=True)
        additive = [
            torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
            if mask.dtype == torch.bool
            else mask
            for mask in masks
        ]
        return functional.pad(additive[0] if len(additive) == 1 else additive[0] + additive[1], (0, added))

    def _checked(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> _Sizes:
        """The sizes of a call. The classes of errors are PyTorch's."""
        dims = query.dim(), key.dim(), value.dim()
        if dims not in ((2, 2, 2), (3, 3, 3)):
            raise expected("query, key and value with 2 or 3 dimensions each", list(dims), AssertionError)
        batched = dims[0] == 3
        # (batch, length) of the three
        leading = [x.shape[:2] if batched else (1, x.shape[0]) for x in (query, key, value)]
        if batched and not self.batch_first:
            leading = [(batch, length) for length, batch in leading]
        sizes = _Sizes(leading[0][0], leading[0][1], leading[1][1])
        for name, x, width in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            if x.shape[-1] != width:
                raise expected(f"{name} of embedding dimension {width}", x.shape[-1], AssertionError)
        if leading[1] != leading[2]:
            got = f"{tuple(leading[1])} and {tuple(leading[2])}"
            raise expected("key and value of one (batch, length)", got, AssertionError)
        if leading[0][0] != leading[1][0]:
            raise expected(f"key of the query's batch size {sizes.batch}", leading[1][0], RuntimeError)
        if is_causal and attn_mask is None:
            raise expected("attn_mask with the is_causal hint", "none", RuntimeError)
        if attn_mask is not None:
            _check_kind("attn_mask", attn_mask)
            shapes = [(sizes.queries, sizes.keys), (sizes.batch * self.num_heads, sizes.queries, sizes.keys)]
            if tuple(attn_mask.shape) not in shapes:
                raise expected(
                    f"attn_mask of shape {shapes[0]} or {shapes[1]}", tuple(attn_mask.shape), RuntimeError
                )
        if key_padding_mask is not None:
            _check_kind("key_padding_mask", key_padding_mask)
            shape = (sizes.batch, sizes.keys) if batched else (sizes.keys,)
            if tuple(key_padding_mask.shape) != shape:
                raise expected(
                    f"key_padding_mask of shape {shape}", tuple(key_padding_mask.shape), AssertionError
                )
        return sizes

    @property
    def row_stats(self) -> RowStats | None:
        """As `hnf_attention.nn.row_stats`: (B, H, L), over the keys that add_bias_kv and add_zero_attn append as well.

        B is 1 for unbatched input.
        """
        return rows.row_stats(self)


def _check_kind(name: str, mask: Tensor) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise expected(f"{name} of a boolean or floating dtype", mask.dtype, AssertionError)
