"""Position biases of a built model: what is added to its scores beside q.k, as far as weights tell."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

# A number for each relative position and head, (positions, H): Swin's and BEiT's tables, T5's embedding.
TABLES = ("relative_position_bias_table", "relative_attention_bias.weight")
# Other parameters whose name says position enter the scores some other way, with the query mostly.
_POSITION = re.compile(r"(^|[._])(rel|relative|dist|distance|pos|position)([._]|$)")
_RELATIVE = re.compile(
    r"position_bias|(^|_)(rel|relative|dist|distance)_(pos|attention)"
)  # what a stack holds for all
_T5_BLOCK = re.compile(r"^(.*\bblock\.)\d+(\.layer\.0\.SelfAttention)$")


@torch.no_grad()
def position_bias(model: nn.Module, name: str, heads: int) -> Tensor | float:
    """Largest |bias| that a position adds to a score of the attention `name`, (H,) fp64; 0 without any.

    What hides keys by a finite number (Swin's -100 between shifted windows) is a mask, and not in it.

    Raises ValueError where positions enter the scores in a way that is not read.
    """
    module = model.get_submodule(name)
    if type(module).__name__ == "BloomAttention" or getattr(getattr(model, "config", None), "alibi", False):
        raise ValueError("an ALiBi bias is added to its scores, which grows with the length")
    tables, unread = [], []
    for prefix, holder in _holders(model, name):
        for path, parameter in holder.named_parameters():
            if f"{prefix}{path}".endswith(TABLES):
                tables.append(parameter)
            elif prefix or _POSITION.search(path):
                unread.append(f"{prefix}{path}")
    if unread:
        raise ValueError(f"positions enter its scores through {unread[0]}, which is not read")
    wrong = [tuple(table.shape) for table in tables if table.dim() != 2 or table.shape[1] != heads]
    if wrong:
        raise ValueError(f"expected a position bias of shape (positions, {heads}), got {wrong[0]}")
    return sum(
        (table.double().cpu().abs().amax(0) for table in tables), torch.zeros(heads, dtype=torch.float64)
    )


def _holders(model: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """Modules with tables for this attention: its own, what T5's first block holds for all, and what a stack shares."""
    found = [("", model.get_submodule(name))]
    block = _T5_BLOCK.match(name)
    if block is not None and not model.get_submodule(name).has_relative_attention_bias:
        found.append(("", model.get_submodule(f"{block[1]}0{block[2]}")))
    parts = name.split(".")
    for depth in range(len(parts)):
        parent = model.get_submodule(".".join(parts[:depth]))
        shared = (child for child in parent.named_children() if _RELATIVE.search(child[0]))
        found += [(f"{path}.", child) for path, child in shared]
    return found
