"""Where a module keeps the statistics of its last forward."""

from __future__ import annotations

from torch import nn

from ..statistics.rows import RowStats

ATTRIBUTE = "_hnf_attention_rows"


class Kept:
    """Statistics in an attribute of a module. Copies and pickles of the module get None instead."""

    def __init__(self, rows: RowStats | None):
        self.rows = rows

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()


def keep(module: nn.Module, rows: RowStats | None) -> None:
    """Keep these statistics at the module, in place of those of before."""
    setattr(module, ATTRIBUTE, Kept(rows))


def forget(module: nn.Module) -> None:
    """Leave the module without the attribute, as it was before the first `keep`."""
    vars(module).pop(ATTRIBUTE, None)


def row_stats(module: nn.Module) -> RowStats | None:
    """The `RowStats` (B, H, M) of the last forward of an attention module, outside autograd; None if there are none.

    module: one of `hnf_attention.nn`, one that `swap_attention` swapped, or an attention layer of a model of
    transformers whose `attn_implementation` is "hnf_attention". They are of the softmax before dropout. A module that
    several threads run keeps those of the call that ended last. There are none before the first forward, in a copy or
    pickle, in a transform of torch.func, and for nested, distributed and meta tensors.
    """
    kept = getattr(module, ATTRIBUTE, None)
    return None if kept is None else kept.rows
