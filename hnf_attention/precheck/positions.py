"""Position biases of a built model: what is added to its scores beside q.k, if the weights tell."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

# One number for each relative position and head, (positions, H): the tables of Swin and BEiT, T5's embedding.
TABLES = ("relative_position_bias_table", "relative_attention_bias.weight")
# Other parameters whose name says position. They enter the scores in some other way, mostly with the query.
_POSITION = re.compile(r"(^|[._])(rel|relative|dist|distance|pos|position)([._]|$)")
# A module that a stack of layers shares.
_SHARED = re.compile(r"position_bias|(^|_)(rel|relative|dist|distance)_(pos|attention)")
_T5_BLOCK = re.compile(r"^(.*\bblock\.)\d+(\.layer\.0\.SelfAttention)$")


@torch.no_grad()
def position_bias(model: nn.Module, name: str, heads: int) -> Tensor:
    """Largest |bias| that a position adds to a score of the attention `name`, (H,) fp64; 0 without any.

    A finite number that hides keys (Swin adds -100 between shifted windows) is a mask, and does not count.

    Raises ValueError if positions enter the scores in a way that cannot be read.
    """
    module = model.get_submodule(name)
    if type(module).__name__ == "BloomAttention" or getattr(getattr(model, "config", None), "alibi", False):
        raise ValueError("an ALiBi bias is added to its scores, which grows with the length")
    tables: list[Tensor] = []
    unread: list[str] = []
    for prefix, holder in _holders(model, name):
        for path, parameter in holder.named_parameters():
            if f"{prefix}{path}".endswith(TABLES):
                tables.append(parameter)
            elif prefix or _POSITION.search(path):
                unread.append(f"{prefix}{path}")
    if unread:
        raise ValueError(f"positions enter its scores through {unread[0]}, which cannot be read")
    wrong = [tuple(table.shape) for table in tables if table.dim() != 2 or table.shape[1] != heads]
    if wrong:
        raise ValueError(f"expected a position bias of shape (positions, {heads}), got {wrong[0]}")
    largest = torch.zeros(heads, dtype=torch.float64)
    for table in tables:
        largest = largest + table.double().cpu().abs().amax(0)
    return largest


def _holders(model: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """(prefix, module) of every module whose tables this attention may use.

    These are the attention itself, T5's first block (which holds the table for all blocks), and shared modules of the
    stacks around it. Only a shared module has a prefix, its name.
    """
    found = [("", model.get_submodule(name))]
    block = _T5_BLOCK.match(name)
    if block is not None and not getattr(found[0][1], "has_relative_attention_bias", False):
        found.append(("", model.get_submodule(f"{block[1]}0{block[2]}")))
    parts = name.split(".")
    for depth in range(len(parts)):
        parent = model.get_submodule(".".join(parts[:depth]))
        shared = (child for child in parent.named_children() if _SHARED.search(child[0]))
        found += [(f"{path}.", child) for path, child in shared]
    return found
