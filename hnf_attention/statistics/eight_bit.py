"""Tensors of 8-bit floating numbers with their scales, as the numbers that they stand for.

bf16 holds every number of both 8-bit formats. Times a scale, fp32 holds it within 2^-24.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import FLOAT_DTYPES, check_dense, expected

EIGHT_BIT_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def widened(x: Tensor) -> Tensor:
    """An 8-bit tensor in bf16, exactly; another one as it is."""
    return x.to(torch.bfloat16) if x.dtype in EIGHT_BIT_DTYPES else x


def scaled(x: Tensor, descale: Tensor | None, seqlens: Tensor | None) -> Tensor:
    """x (B, H, L, D) times `descale` (B, H_kv), or of packed sequences (S, H_kv), in fp32.

    seqlens: (S + 1,), the borders of sequences in a batch of 1, or None. None for `descale` is 1.
    """
    x = x.float()
    if descale is None:
        return x
    of_heads = descale.float().repeat_interleave(x.shape[1] // descale.shape[1], 1)
    if seqlens is None:
        return x * of_heads[:, :, None, None]
    places = torch.arange(x.shape[2], device=x.device, dtype=seqlens.dtype)
    sequence = torch.searchsorted(seqlens[1:].contiguous(), places, right=True)
    sequence = sequence.clamp(max=descale.shape[0] - 1)  # of tokens behind the last one
    return x * of_heads[sequence].T[None, :, :, None]


def as_numbers(
    query: Tensor,
    key: Tensor,
    query_descale: Tensor | None,
    key_descale: Tensor | None,
    seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Queries and keys of `attention_stats` that may be of 8 bits, in the dtype to compute in.

    Raises TypeError or ValueError for scales that do not fit; other faults of the tensors are left to the call.
    """
    named = {"query_descale": query_descale, "key_descale": key_descale}
    given = {name: descale for name, descale in named.items() if descale is not None}
    tensors = (query, key)
    eight_bit = all(isinstance(x, Tensor) and x.dtype in EIGHT_BIT_DTYPES for x in tensors)
    if not eight_bit:
        if given:
            kinds = " and ".join(str(getattr(x, "dtype", type(x).__name__)) for x in tensors)
            raise expected(f"{next(iter(given))} beside 8-bit queries and keys only", kinds, TypeError)
        return query, key
    if not given or query.dim() != 4 or key.dim() != 4:
        return widened(query), widened(key)
    shape = (key.shape[0] if seqlens is None else len(seqlens) - 1, key.shape[1])
    for name, descale in given.items():
        check_dense(name, descale, " or None")
        if descale.shape != shape:
            kind = "batch" if seqlens is None else "sequences"
            raise expected(f"{name} of shape ({kind}, key heads) = {shape}", tuple(descale.shape))
        if descale.dtype not in FLOAT_DTYPES:
            raise expected(f"{name} of a floating dtype", descale.dtype, TypeError)
        if descale.device != key.device:
            raise expected(f"{name} on the key's device {key.device}", descale.device)
    if query.shape[1] % key.shape[1]:
        return widened(query), widened(key)
    return scaled(query, query_descale, seqlens), scaled(key, key_descale, seqlens)
