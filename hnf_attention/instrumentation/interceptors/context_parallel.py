"""Measures rings of PyTorch's context parallelism: `context_parallel`, and SDPA modules that are parallelised for it.

Each process keeps its queries, and keys and values of all processes pass. PyTorch's ring calls an operator for each
block that a process needs. Beside it the block is probed, and the rows are merged over blocks. Nothing is exchanged for
it, so a process whose monitor rests keeps no other one waiting.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ... import compat
from .. import blocks, observer, sharded
from ..patches import Patch, of_item

NAME = "context_parallel"
NO_RING = "context_parallel computed it without a ring, so no block of keys was seen"
_PLACE = "torch.distributed.tensor.experimental."


class _Thread(threading.local):
    """watch: takes in the blocks of the ring that runs on this thread."""

    watch: blocks.Watch | None = None


_thread = _Thread()


def is_wrapper(function: Callable[..., Any]) -> bool:
    """Whether `context_parallel` put this function in the place of `scaled_dot_product_attention`."""
    return getattr(function, "__module__", "").startswith(_PLACE)


def run(
    original: Callable[..., Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    find: Callable[..., observer.Owner | None] | None,
) -> Tensor:
    """Run a call of `scaled_dot_product_attention` whose queries are split over processes by their sequence."""
    query: Any = args[0] if args else kwargs.get("query")
    with blocks.watched(NAME, find) as watch:
        if watch is None:
            return original(*args, **kwargs)
        split = sharded.is_sharded(query)
        watch.why_none = sharded.by_placements(query.placements) if split else NO_RING
        watch.head_dim = query.shape[-1] if isinstance(query, Tensor) else None
        output = _seen(watch, original, args, kwargs)
        part = sharded.own_part(output, query) if split else output
        watch.output = part if part is not None and part.dim() == 4 else None
        return output


def _seen(
    watch: blocks.Watch, original: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """Run the call while the watch sees the blocks of a ring on this thread."""
    ring = compat.ring_attention()
    if ring is None:
        return original(*args, **kwargs)
    patch = Patch.acquire(*of_item(*ring), _beside)
    _thread.watch = watch
    try:
        return original(*args, **kwargs)
    finally:
        _thread.watch = None
        patch.release()


def _beside(original: Callable[..., Any]) -> Callable[..., Any]:
    """PyTorch's ring, in which each block is shown to the watch of the thread."""

    @functools.wraps(original)
    def ring(
        group: Any, seq_dim: int, op: Callable[..., Any], query: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        watch = _thread.watch
        if watch is None:
            return original(group, seq_dim, op, query, *args, **kwargs)
        watch.begin(query, scale=kwargs.get("scale"))
        rank, size, length = dist.get_rank(group), dist.get_world_size(group), query.shape[2]
        step = 0

        def shown(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Any:
            nonlocal step
            result = op(q, k, v, *rest, **options)
            # Keys come from this process, then from the one before it, and so on. The first key of the sequence is that
            # of process 0, in every order. Of two pieces of queries, the later one alone may meet a block.
            source = (rank - step) % size
            step += 1
            watch.add(
                k,
                v,
                start=source,
                queries=slice(length - q.shape[2], length),
                is_causal=bool(options.get("is_causal", False)),
            )
            return result

        return original(group, seq_dim, shown, query, *args, **kwargs)

    return ring
