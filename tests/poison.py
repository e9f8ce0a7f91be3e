"""Memory that shows what was never written, and what was written beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

GUARD = 64  # elements before and behind a tensor; its own place stays a multiple of 16 bytes


def _poison(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point:
        return torch.nan
    return True if dtype == torch.bool else 0x5A if dtype.itemsize == 1 else -0x5A5A5A5B


def guarded(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str,
    strides: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """A tensor of poison, contiguous or with these strides; and the larger storage of poison that it lies in, flat."""
    strides = strides or [math.prod(max(1, n) for n in shape[place + 1 :]) for place in range(len(shape))]
    size = 1 + sum((n - 1) * step for n, step in zip(shape, strides)) if math.prod(shape) else 0
    whole = torch.full((size + 2 * GUARD,), _poison(dtype), dtype=dtype, device=device)
    # Not a view: autograd treats a view that a function returns differently.
    x = torch.zeros(0, dtype=dtype, device=device)
    return x.set_(whole.untyped_storage(), GUARD, tuple(shape), tuple(strides)), whole


def poison_gaps(x: Tensor) -> None:
    """Fill what belongs to the storage of x, and to no element of it, with NaN."""
    storage = torch.zeros(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
    used = torch.zeros(storage.shape, dtype=torch.bool, device=x.device)
    if x.numel():
        used.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(True)
    storage.masked_fill_(~used, torch.nan)


class Made(list):
    """The storages that were made while memory was poisoned, flat."""

    def overrun(self) -> list[str]:
        """What was written beside the tensor that lies in one of them."""
        found = []
        for whole in self:
            ends = torch.cat([whole[:GUARD], whole[len(whole) - GUARD :]])
            kept = ends.isnan() if whole.dtype.is_floating_point else ends == _poison(whole.dtype)
            if not bool(kept.all()):
                found.append(
                    f"memory beside {len(whole) - 2 * GUARD} numbers of {whole.dtype} was overwritten"
                )
        return found


@contextmanager
def poisoned_memory() -> Iterator[Made]:
    """Within it, the functions of PyTorch for memory without content that the engines call give `guarded` memory."""
    made, empty_strided = Made(), torch.empty_strided

    def make(shape, dtype, device, strides=None) -> Tensor:
        x, whole = guarded(shape, dtype, device, strides)
        made.append(whole)
        return x

    def sizes(shape: tuple) -> tuple[int, ...]:
        return tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape

    def empty(*shape, dtype=None, device="cpu"):
        return make(sizes(shape), dtype or torch.get_default_dtype(), device)

    def new_empty(x, *shape, dtype=None, device=None):
        return make(sizes(shape), dtype or x.dtype, device or x.device)

    def empty_like(x, **keywords):
        return make(x.shape, x.dtype, x.device)

    def strided(shape, strides, *, dtype, device):
        dense = math.prod(shape) and all(strides)
        return (
            make(shape, dtype, device, strides)
            if dense
            else empty_strided(shape, strides, dtype=dtype, device=device)
        )

    with (
        mock.patch.object(torch, "empty", empty),
        mock.patch.object(torch, "empty_like", empty_like),
        mock.patch.object(torch, "empty_strided", strided),
        mock.patch.object(Tensor, "new_empty", new_empty),
    ):
        yield made
