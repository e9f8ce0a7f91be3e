"""Attention whose keys come in blocks, one after the other: a ring of processes, or keys that are read in parts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..engine import engines
from ..engine.blocks import BlockRows
from ..engine.call import check
from ..errors import let_out
from ..reference.measured import Measured
from ..statistics.checks import expected
from ..statistics.rows import RowStats
from ..tracing import captured, transformed, without_dispatch_modes, without_tangents
from . import observer
from .call import AttentionCall, Unmeasurable
from .measurement import Measurement

BLOCKS = "observe_blocks"
NOT_KEPT = "its keys come in blocks, which are not kept"
CAPTURED = "its keys come in blocks inside the capture of a CUDA graph"


class Watch:
    """Measures one call for the owner of its layer. None of its methods raises an error.

    interceptor: who caught the call, for the coverage report. options: as `BlockRows` takes them.
    output: what the call gave, (B, H or 1, M, any); None if it is not known. why_none: the reason to be listed if there
    was no block. head_dim: of the model's queries, None for that of the queries that met the blocks.
    """

    def __init__(self, owner: observer.Owner, interceptor: str, options: dict[str, Any]):
        self.output: Tensor | None = None
        self.why_none = "no block of keys was seen"
        self.head_dim: int | None = None
        self._owner, self._interceptor, self._options = owner, interceptor, options
        self._query: Tensor | None = None
        self._rows: BlockRows | None = None
        self._failure: Exception | None = None

    def begin(self, query: Tensor, **options: Any) -> None:
        """Take in the queries (B, H, M, D) of the call, and more options."""
        self._query = query = query.detach()
        options |= self._options

        def run() -> None:
            left_out = self._owner.observer.left_out(self._owner.layer, query)
            self._rows = BlockRows(query, left_out=left_out, **options)

        self._try(run)

    def add(self, *args: Any, **kwargs: Any) -> None:
        """Take in a block, as `BlockRows.add` does."""
        rows = self._rows
        if rows is not None:
            self._try(lambda: rows.add(*args, **kwargs))

    def _try(self, run: Callable[[], None]) -> None:
        if self._failure is not None or self._query is None:
            return
        try:
            with _hidden(self._query):
                run()
        except Exception as error:  # the monitor never ends a run
            let_out(error)
            self._failure = error.with_traceback(None)

    def deliver(self) -> None:
        """Hand on what the blocks gave."""
        layer = self._owner.layer
        numbers = functools.cache(self._numbers)  # for several handles of the model

        def measure() -> Measurement:
            query, rows, beside = numbers()
            return Measurement(layer, rows, self.head_dim or query.shape[3], query.dtype, beside=beside)

        self._owner.observer.observe(layer, self._interceptor, measure)

    def _numbers(self) -> tuple[Tensor, RowStats, Measured]:
        if self._failure is not None:
            raise self._failure
        if self._rows is None or self._query is None or not self._rows.begun:
            raise Unmeasurable(self.why_none)
        with _hidden(self._query):
            output = None if self.output is None else self.output.detach()
            return self._query, *self._rows.result(output)


@contextmanager
def _hidden(query: Tensor) -> Iterator[None]:
    """Hide what runs inside from autograd, dispatch modes, tangents and autocast."""
    with ExitStack() as stack:
        for context in (
            torch.no_grad(),
            without_dispatch_modes(),
            without_tangents(),
            engines.no_autocast(query),
        ):
            stack.enter_context(context)
        yield


@contextmanager
def watched(
    interceptor: str, find: Callable[..., observer.Owner | None] | None = None, **options: Any
) -> Iterator[Watch | None]:
    """Around one attention call whose keys come in blocks: what measures it, None where nobody does.

    find: as for `observer.measuring_owner`. options: as `BlockRows` takes them. Attention inside is part of the call.
    """
    if not (observer.active or observer.keeping) or transformed() or observer.repeats():
        yield None
        return
    owner, keeper = None, None
    try:
        owner = observer.measuring_owner(find) if observer.active else None
        keeper = observer.keeping_owner(find) if observer.keeping else None
    except Exception as error:  # the monitor never ends a run
        observer.note_fault(error)
    if owner is None and keeper is None:
        yield None
        return
    if owner is not None and captured():  # a first call compiles kernels, which would break the capture
        owner.observer.note(owner.layer, CAPTURED)
        owner = None
    watch = None if owner is None else Watch(owner, interceptor, options)
    observer.thread.suspended = True
    try:
        yield watch
    finally:
        observer.thread.suspended = False
    if watch is not None:
        watch.deliver()
    if keeper is not None:
        found, invocation = keeper
        found.observer.keep(found.layer, invocation, _refuse, None, None)


def _refuse() -> AttentionCall:
    raise Unmeasurable(NOT_KEPT, lasting=True)


class BlockedCall:
    """One attention call whose keys come in blocks, see `observe_blocks`.

    output: what the call gave, (B, H or 1, M, any), looked at for NaN and inf. Set it before the context ends.
    """

    def __init__(self, query: Tensor, options: dict[str, Any], watch: Watch | None):
        self.output: Tensor | None = None
        self._query, self._options, self._watch = query, options, watch

    def add(
        self,
        key: Tensor,
        value: Tensor | None = None,
        *,
        start: int,
        queries: slice = slice(None),
        is_causal: bool = False,
        attn_mask: Tensor | None = None,
        rows: RowStats | None = None,
    ) -> None:
        """Say that these queries meet this block of keys.

        key: (B, H_kv, n, D). value: (B, H_kv, n, D_v), looked at for NaN and inf; None if it is not known.
        start: the position of the block's first key in the sequence. A block that several parts of the queries meet has
            the same start each time.
        queries: which of the process's queries meet the block; step 1.
        is_causal, attn_mask: as `attention` takes them, of these queries and this block alone: query i of the part sees
            keys 0..i of the block.
        rows: the block's statistics, if `attention` gave them. Otherwise they are computed, where they are measured.

        Raises ValueError or TypeError (expected, got) for anything else, also where nothing is measured.
        """
        if isinstance(start, bool) or not isinstance(start, int) or start < 0:
            raise expected("start to be an int >= 0", start)
        if not isinstance(queries, slice) or queries.step not in (None, 1):
            raise expected("queries to be a slice of step 1", queries, TypeError)
        part = self._query[:, :, queries]
        check(
            part,
            key,
            value,
            attn_mask=attn_mask,
            is_causal=is_causal,
            window_size=None,
            **self._options,
        )
        if rows is not None and not isinstance(rows, RowStats):
            raise expected("rows to be RowStats or None", type(rows).__name__, TypeError)
        if rows is not None and rows.lse.shape != part.shape[:3]:
            raise expected(f"rows of shape {tuple(part.shape[:3])}", tuple(rows.lse.shape))
        if self._watch is not None:
            self._watch.add(
                key.detach(),
                None if value is None else value.detach(),
                start=start,
                queries=queries,
                is_causal=is_causal,
                attn_mask=None if attn_mask is None else attn_mask.detach(),
                rows=None if rows is None else rows.detach(),
            )


@contextmanager
def observe_blocks(
    query: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Iterator[BlockedCall]:
    """Tell whoever measures the running module of an attention call whose keys come in blocks, as in a ring.

    To be used in the forward of a module, around the loop over the blocks:

        with observe_blocks(query) as call:
            for ...:
                call.add(key, value, start=position, is_causal=own)
            call.output = out

    query: the process's queries, (B, H, M, D). scale, softcap, sinks: as `attention` takes them.

    The statistics are exact, and one measurement with all rows reaches the monitor. Let it put processes together with
    `ProcessGroups(queries=group)`. No process waits for another one here. Where nothing is measured, as between log
    steps, this costs some checks of arguments. Attention inside the context is part of the call, and is not measured
    by itself. In a compiled graph nothing is measured.

    Raises ValueError or TypeError as `attention` does, for a wrong query at the first block.
    """
    if not isinstance(query, Tensor) or query.dim() != 4:
        got = tuple(query.shape) if isinstance(query, Tensor) else type(query).__name__
        raise expected("query of shape (batch, heads, length, head_dim)", got)
    options = {"scale": scale, "softcap": softcap, "sinks": sinks}
    with watched(BLOCKS, None, **options) as watch:
        call = BlockedCall(query, options, watch)
        if watch is not None:
            watch.begin(query)
        yield call
        if watch is not None:
            watch.output = call.output
