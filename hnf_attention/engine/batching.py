"""What torch.func.vmap does with a call: the examples become one batch, or are computed one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Positions among the arguments of the operators, and of the extended statistics among the results of the forward.
_MASK, _SINKS, _SEQLENS, _EXTENDED = 3, 4, 5, 5

Batched = tuple[
    tuple[Tensor, ...], tuple[int | None, ...]
]  # results, and the dimension of the examples in each


def in_one_batch(
    operator: Callable[..., tuple[Tensor, ...]],
    examples: int,
    in_dims: Sequence[Any],
    arguments: Sequence[Any],
) -> Batched:
    """The results of an operator of a call for each example, computed as one larger batch.

    arguments: those of the operator; in_dims: the dimension of the examples in each, None in one that they share.
    """
    query = arguments[0]
    batch = query.select(in_dims[0], 0).shape[0] if in_dims[0] is not None else query.shape[0]
    folded = []
    for place, (x, dim) in enumerate(zip(arguments, in_dims)):
        if isinstance(x, Tensor) and not (place == _MASK and dim is None and x.shape[0] == 1):
            x = x.movedim(dim, 0) if dim is not None else x.expand(examples, *x.shape)
            x = x.expand(-1, batch, *x.shape[2:]).flatten(0, 1)  # a mask may be shared by the batch
        folded.append(x)
    results, dims = [], []
    for place, x in enumerate(operator(*folded)):
        dim = None if x.dim() == 1 else int(place == _EXTENDED)  # one dimension: a placeholder
        results.append(x if dim is None else x.unflatten(dim, (examples, batch)))
        dims.append(dim)
    return tuple(results), tuple(dims)


def one_by_one(
    operator: Callable[..., tuple[Tensor, ...]],
    examples: int,
    in_dims: Sequence[Any],
    arguments: Sequence[Any],
) -> Batched:
    """As `in_one_batch`, by one call for each example."""

    def one(number: int) -> tuple[Tensor, ...]:
        batched = (isinstance(x, Tensor) and dim is not None for x, dim in zip(arguments, in_dims))
        return operator(
            *(x.select(dim, number) if of_it else x for x, dim, of_it in zip(arguments, in_dims, batched))
        )

    columns = zip(*(one(number) for number in range(examples)))
    results = tuple(torch.stack(column) for column in columns)
    return results, (0,) * len(results)


def fits_one_batch(arguments: Sequence[Any]) -> bool:
    """Whether the examples of a call can be one batch. Sinks have no batch, and a pack of sequences is a batch of 1."""
    return arguments[_SINKS] is None and arguments[_SEQLENS] is None
