"""The extremes of the attention calls of one forward: by one launch for all calls that are alike, on CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import extremes as reference
from ..reference.options import Options
from . import engines

#: query (B, H, M, D), key (B, H_kv, N, D), value (B, H_kv, N, D_v), and out (B, H, M, D_v), None if it is not known
Tensors = tuple[Tensor, Tensor, Tensor, Tensor | None]


class Call(NamedTuple):
    """One call, and the result that it raises: see `reference.extremes.raise_result`."""

    tensors: Tensors
    options: Options
    left_out: Tensor | None
    result: Tensor


class Prepared:
    """What is the same from forward to forward, for calls of the same shapes and strides.

    It keeps none of their tensors.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        self._by_reference: list[tuple[int, Options, Tensor | None, Tensor]] = []
        groups: dict[tuple[object, ...], list[int]] = {}
        for place, (tensors, options, left_out, result) in enumerate(calls):
            query, key, value, _ = tensors
            if min(query.numel(), key.numel(), value.numel()) == 0:
                continue
            if engines.kernels_cover(query, value):
                groups.setdefault(_kind(tensors, options, left_out), []).append(place)
            else:
                self._by_reference.append((place, options, left_out, result))
        self._copies = False  # some tensor has another inner stride than 1
        self._launches: list[tuple[Any, list[int]]] = []
        for places in groups.values():
            kernel, first = engines.kernel("measure.extremes"), calls[places[0]]
            with engines.on_device(first.tensors[0]):
                given = [calls[place].tensors for place in places]
                mine = [kernel.Tensors(*map(with_inner_stride, call)) for call in given]
                self._copies |= any(x is not y for pair in zip(mine, given) for x, y in zip(*pair))
                results = [calls[place].result for place in places]
                self._launches.append((kernel.Launch(mine, results, first.options, first.left_out), places))

    @torch.no_grad()
    def run(self, calls: Sequence[Tensors], number: int, phase: int) -> None:
        """Raise the results by what one forward shows; no host synchronisation.

        calls: as many as it was prepared for, in their order. number: of this forward, 1 to 2^31 - 1. phase: as for
        `raise_result`; the n-th call of a launch is n phases ahead.
        """
        for launch, places in self._launches:
            with engines.on_device(calls[places[0]][0]):
                mine = [calls[place] for place in places]
                if self._copies:
                    mine = [tuple(map(with_inner_stride, call)) for call in mine]  # type: ignore[misc]
                launch.run(mine, number, phase)
        for place, options, left_out, result in self._by_reference:
            with engines.no_autocast(calls[place][0]):
                reference.raise_result(result, *calls[place], options, left_out, number, phase)


def _kind(tensors: Tensors, options: Options, left_out: Tensor | None) -> tuple[object, ...]:
    """What calls of one launch have in common."""
    query, key, value, out = tensors
    shapes = query.shape, key.shape, value.shape[3], query.dtype, query.device, out is None
    return *shapes, *(_identity(x) for x in options), _identity(left_out)


def _identity(x: object) -> object:
    """Equal for the same number, and for tensors with the same memory and layout."""
    return (x.data_ptr(), x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x


def with_inner_stride(x: Tensor | None) -> Tensor | None:
    """The tensor (.., L, D), copied if its numbers of a row do not lie side by side."""
    return x if x is None or x.stride(3) == 1 else x.contiguous()
