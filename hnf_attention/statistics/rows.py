"""Row statistics of one attention call, and their merge over disjoint blocks of keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..tracing import readable
from . import shares
from .checks import check_sinks, expected
from .fields import EXTENDED_FIELDS


@dataclass(frozen=True, eq=False)
class RowStats:
    """Softmax statistics of every query row; each tensor is (B, H, M), fp32 (fp64 for fp64 inputs).

    `lse`, `entropy`, `max_logit` and `min_logit` (nats) are always there. The others are None unless asked
    for with `extended=True`. `score_mean` (plain mean over visible keys, nats) and `visible_keys` (their
    number, int64) are there because merging `score_std` needs them. An empty row (no visible key) has
    lse = max_logit = -inf, min_logit = +inf and 0 elsewhere. A row that NaN or inf reached is NaN in
    every field but `visible_keys`.

    A sample of rows is compact: row i of (b, h) is query `row_index[b, h, i]`, int64 (B, H, M_s). An index
    of -1 marks a place without a query, which holds the statistics of an empty row.

    Two objects are equal only if they are one. It is a pytree of its tensors: `torch.func`, `torch.export` and hooks of
    FSDP see each of them.
    """

    lse: Tensor
    entropy: Tensor
    max_logit: Tensor
    min_logit: Tensor
    logit_var: Tensor | None = None
    collision: Tensor | None = None
    score_std: Tensor | None = None
    sink_mass: Tensor | None = None
    score_mean: Tensor | None = None
    visible_keys: Tensor | None = None
    row_index: Tensor | None = None

    def __repr__(self) -> str:
        """Shape, dtype, device and known fields; ranges too, where reading them makes no host wait."""
        known = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if readable(self.lse):
            ranged = {name: getattr(self, name).detach().numpy() for name in ("entropy", "max_logit")}
            known = [value_range(name, ranged[name]) if name in ranged else name for name in known]
        dtype = str(self.lse.dtype).removeprefix("torch.")
        where = f"RowStats of {tuple(self.lse.shape)} rows, {dtype} on {self.lse.device}"
        return f"{where}: {', '.join(known)}"

    @property
    def max_weight(self) -> Tensor:
        """Largest softmax weight on a key, exp(max_logit - lse); 0 for an empty row."""
        return torch.where(self.max_logit == -torch.inf, 0.0, (self.max_logit - self.lse).exp())

    @property
    def logit_range(self) -> Tensor:
        """max_logit - min_logit in nats; 0 for an empty row."""
        return torch.where(self.max_logit == -torch.inf, 0.0, self.max_logit - self.min_logit)

    @property
    def tie_mass(self) -> Tensor:
        """collision / max_weight: 1 when exact maxima hold all the mass.

        Raises ValueError without the extended statistics.
        """
        if self.collision is None:
            raise ValueError("tie_mass needs the extended statistics; call with extended=True")
        return torch.where(self.max_logit == -torch.inf, 0.0, self.collision / self.max_weight)

    def merge(self, *others: RowStats, sinks: Tensor | None = None) -> RowStats:
        """The statistics of the same rows over all the keys of these disjoint key blocks, in any order.

        For ring or context-parallel attention and split-KV decoding; `merge_attention` merges the
        outputs too. Exact up to the rounding of its inputs (in fp32 at |lse| = 1e4, `lse` itself is
        good to 5e-4 nats), associative and commutative. A block in which a row sees no key does not
        change that row. Differentiable in `lse`, `entropy` and `sinks`.

        sinks: (H,) learned sinks. Give them here, once, and to none of the blocks: a sink is one
            element of the whole row's softmax, and a block whose keys are all hidden would lose it.
        A field that one block lacks is missing from the result. `sink_mass` is None: which block holds the
        first visible key is not known here. Samples merge if all blocks took the same (period, phase).
        Raises ValueError or TypeError when blocks differ in shape, dtype, device or rows.
        """
        blocks = (self, *others)
        check_blocks(blocks, sinks)
        return merge_rows(blocks, sinks)[0]

    def detach(self) -> RowStats:
        """The same numbers, outside the autograd graph."""
        values = (getattr(self, f.name) for f in fields(self))
        detached: Any = (None if v is None else v.detach() for v in values)
        return RowStats(*detached)

    def pack(self, extended: bool) -> tuple[Tensor | None, ...]:
        """As the kernels return them: (lse, entropy, max_logit, min_logit, more).

        more: with `extended` the EXTENDED_FIELDS, (6, B, H, M) in the dtype of `lse`, else None.
        """
        more = None
        if extended:
            more = torch.stack([getattr(self, name).to(self.lse.dtype) for name in EXTENDED_FIELDS])
        return self.lse, self.entropy, self.max_logit, self.min_logit, more

    @staticmethod
    def unpack(
        lse: Tensor,
        entropy: Tensor,
        max_logit: Tensor,
        min_logit: Tensor,
        more: Tensor | None = None,
        row_index: Tensor | None = None,
    ) -> RowStats:
        """What `pack` gave. Numbers of keys are exact there up to 2^24 in fp32."""
        core = (lse, entropy, max_logit, min_logit)
        if more is None:
            return RowStats(*core, row_index=row_index)
        extended: dict[str, Any] = dict(zip(EXTENDED_FIELDS, more.unbind(0)))
        extended["visible_keys"] = extended["visible_keys"].long()
        return RowStats(*core, row_index=row_index, **extended)


torch.export.register_dataclass(RowStats, serialized_type_name="hnf_attention.RowStats")


def value_range(name: str, values: np.ndarray) -> str:
    """The finite range of some numbers, and how many are not finite, as `repr` prints them."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return f"{name} not finite"
    low, high = f"{finite.min():.4g}", f"{finite.max():.4g}"
    rest = "" if finite.size == values.size else f", {values.size - finite.size} not finite"
    return f"{name} {low}{'' if low == high else f' to {high}'}{rest}"


def merge_rows(blocks: Sequence[RowStats], sinks: Tensor | None) -> tuple[RowStats, Tensor]:
    """`RowStats.merge` of checked blocks, and the share (x, B, H, M) of each block's output; a sink's is last."""
    first = blocks[0]
    lses, entropies = [block.lse for block in blocks], [block.entropy for block in blocks]
    if sinks is not None:
        # A sink is one more block of one element: no entropy or variance within it, all of its mass on it.
        empty = torch.stack([lse == -torch.inf for lse in lses]).all(0)
        sink = sinks.to(first.lse.dtype)[None, :, None].expand_as(first.lse)
        lses.append(torch.where(empty, -torch.inf, sink))
        entropies.append(torch.zeros_like(first.lse))
    lse, shared = shares.share_out(torch.stack(lses))
    entropy = torch.stack(entropies)

    def stacked(name: str, of_sink: float) -> Tensor | None:
        values = [getattr(block, name) for block in blocks]
        if any(value is None for value in values):
            return None
        if sinks is not None:
            values.append(torch.full_like(values[0], of_sink))
        return torch.stack(values)

    with torch.no_grad():
        extended = shares.merge_extended(stacked, shared, entropy.detach())
    rows = RowStats(
        lse,
        shares.merge_entropy(entropy, shared),
        torch.stack([block.max_logit for block in blocks]).amax(0),
        torch.stack([block.min_logit for block in blocks]).amin(0),
        row_index=first.row_index,
        **extended,
    )
    return rows, shared.share


def check_blocks(blocks: Sequence[RowStats], sinks: Tensor | None) -> None:
    """Raise ValueError or TypeError for row statistics that cannot be merged.

    Which rows a sample took is compared on the CPU only: on a GPU the host would wait for the device.
    """
    if not blocks:
        raise expected("at least one key block to merge", "none")
    for block in blocks:
        if not isinstance(block, RowStats):
            raise expected("blocks to be RowStats", type(block).__name__, TypeError)
    first, index = blocks[0].lse, blocks[0].row_index
    if first.dim() != 3:
        raise expected("blocks of shape (batch, heads, length)", tuple(first.shape))
    for block in blocks:
        for tensor in (block.lse, block.entropy, block.max_logit, block.min_logit):
            if tensor.shape != first.shape:
                raise expected(f"blocks of shape {tuple(first.shape)}", tuple(tensor.shape))
            if tensor.dtype != first.dtype:
                raise expected(f"blocks of dtype {first.dtype}", tensor.dtype, TypeError)
            if tensor.device != first.device:
                raise expected(f"blocks on {first.device}", tensor.device)
        if not _same_rows(block.row_index, index):
            raise expected("blocks of the same rows", "different samples")
    if sinks is not None:
        check_sinks(sinks, first)


def _same_rows(index: Tensor | None, other: Tensor | None) -> bool:
    if index is None or other is None:
        return index is other
    return not readable(index) or torch.equal(index, other)
