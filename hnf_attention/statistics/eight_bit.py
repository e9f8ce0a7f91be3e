"""Tensors of 8-bit floating numbers with their scales, as the numbers that they stand for.

bf16 and fp16 hold every number of both 8-bit formats. Times a scale, fp32 holds it within 2^-24.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .checks import FLOAT_DTYPES, check_dense, expected

EIGHT_BIT_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def is_eight_bit(x: object) -> bool:
    return isinstance(x, Tensor) and x.dtype in EIGHT_BIT_DTYPES


def widened(x: Any) -> Any:
    """An 8-bit tensor in bf16, exactly; anything else as it is."""
    return x.to(torch.bfloat16) if is_eight_bit(x) else x


def scaled(x: Tensor, descale: Tensor | None, seqlens: Tensor | None) -> Tensor:
    """8-bit numbers x (B, H, L, D), widened or not, times `descale` (B, H_kv), in fp32.

    seqlens: (S + 1,), the borders of sequences in a batch of 1, which `descale` (S, H_kv) has the scales of. None for
    `descale` is 1.
    """
    x = widened(x)
    if descale is None or descale.numel() == 0:
        return x.float()
    of_heads = descale.float().repeat_interleave(x.shape[1] // descale.shape[1], 1)
    if seqlens is None:
        return x * of_heads[:, :, None, None]
    places = torch.arange(x.shape[2], device=x.device, dtype=seqlens.dtype)
    sequence = torch.searchsorted(seqlens[1:].contiguous(), places, right=True)
    sequence = sequence.clamp(max=descale.shape[0] - 1)  # of tokens behind the last one
    return x * of_heads[sequence].T[None, :, :, None]


def check_kinds(query: object, key: object, descales: Mapping[str, object]) -> None:
    """Raise TypeError unless queries and keys are both of 8 bits, or neither and without `descales`, by their names."""
    of_eight = [is_eight_bit(x) for x in (query, key)]
    given = [name for name, descale in descales.items() if descale is not None]
    if all(of_eight) or not (any(of_eight) or given):
        return
    wanted = "query and key both of 8 bits, or neither"
    if not any(of_eight):
        wanted = f"{given[0]} beside 8-bit queries and keys only"
    kinds = (str(x.dtype) if isinstance(x, Tensor) else type(x).__name__ for x in (query, key))
    raise expected(wanted, " and ".join(kinds), TypeError)


def check_descale(name: str, descale: Tensor, key: Tensor, seqlens: Tensor | None) -> None:
    """Raise TypeError or ValueError for a scale that does not fit keys (B, H_kv, N, D)."""
    check_dense(name, descale, " or None")
    rows, of = (key.shape[0], "batch") if seqlens is None else (len(seqlens) - 1, "sequences")
    if descale.shape != (rows, key.shape[1]):
        raise expected(f"{name} of shape ({of}, key heads) = {(rows, key.shape[1])}", tuple(descale.shape))
    if descale.dtype not in FLOAT_DTYPES:
        raise expected(f"{name} of a floating dtype", descale.dtype, TypeError)
    if descale.device != key.device:
        raise expected(f"{name} on the key's device {key.device}", descale.device)
