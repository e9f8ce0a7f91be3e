"""What statistics look like when they are printed: sizes, and the ranges of a few numbers."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

import numpy as np

from ..tracing import readable

if TYPE_CHECKING:
    from .heads import HeadStats, RowStats


def rows(stats: RowStats) -> str:
    """Numbers are left out where they are on another device, for which the host would wait."""
    lse = stats.lse
    known = [field.name for field in fields(stats) if getattr(stats, field.name) is not None]
    text = f"RowStats of {tuple(lse.shape)} rows, {str(lse.dtype).removeprefix('torch.')} on {lse.device}: "
    if not readable(lse):
        return text + ", ".join(known)
    return text + ", ".join(
        _range(name, getattr(stats, name).detach().numpy()) if name in ("entropy", "max_logit") else name
        for name in known
    )


def heads(stats: HeadStats) -> str:
    sampled = f" (1/{stats.sample_period} of them)" if stats.sampled else ""
    return (
        f"HeadStats of {stats.num_heads} heads of dimension {stats.head_dim}, {stats.dtype}: "
        f"{_range('rows', stats.rows)}{sampled}, {_range('normalized_entropy', stats.normalized_entropy)}, "
        f"{_range('max_abs_logit', stats.max_abs_logit)}"
    )


def _range(name: str, values: np.ndarray) -> str:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return f"{name} not finite"
    low, high = f"{finite.min():.4g}", f"{finite.max():.4g}"
    rest = "" if finite.size == values.size else f", {values.size - finite.size} not finite"
    return f"{name} {low}{'' if low == high else f' to {high}'}{rest}"
