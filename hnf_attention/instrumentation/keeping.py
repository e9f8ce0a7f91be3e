"""Attention calls that are kept until their forward ends: what the extremes of every step are read from.

Nothing runs between the model's own kernels. At the end of a forward all its calls are handed on together. Under
autograd their tensors are saved for the backward anyway. Where that is not so, a call is handed on at once.

A training step makes the calls of the step before, with other tensors. Descriptions and what readers made of them are
therefore used again, as long as shapes, strides and options stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import compat
from ..engine.extremes import Tensors
from ..reference.options import Options
from .call import AttentionCall, Unmeasurable, keys_hidden
from .measurement import Forward
from .padding import Padding

#: So much of the tensors of one forward is kept. Where autograd saves other tensors, this is what keeping costs.
MOST_BYTES = 2**30


class Plain(NamedTuple):
    """A call of scaled_dot_product_attention without a mask, as the model made it.

    rest: all that describes the call beside its tensors.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    rest: Hashable


class KeptCall(NamedTuple):
    """What is known of a kept call beside its tensors.

    layer, call: as in `Measurement`. options: as `attention` takes them. left_out: boolean (B, M), rows that are not
    judged, None for none.
    """

    layer: str
    call: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    options: Options
    left_out: Tensor | None


class KeptForward(NamedTuple):
    """Calls of one forward, some or all.

    calls, tensors: descriptions, and for each the tensors of the model. prepared: what readers made of the
    descriptions, by reader; calls of the same descriptions share it.
    """

    forward: Forward
    calls: Sequence[KeptCall]
    tensors: Sequence[Tensors]
    prepared: dict[int, Any]


@dataclass(slots=True, eq=False)
class _Raw:
    """A call as it was made. known: its description and tensors, where they cannot be made later."""

    layer: str
    number: int
    describe: Callable[[], AttentionCall]
    plain: Plain | None
    output: Any
    known: tuple[KeptCall, Tensors] | None
    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]

    def signature(self) -> Hashable:
        """Equal for calls whose descriptions are equal; None where only the description says it."""
        plain, output = self.plain, self.output
        if plain is None or type(output) is not Tensor:
            return None
        query, key, value, rest = plain
        inputs = query.shape, query.stride(), key.shape, key.stride(), value.shape, value.stride()
        dtypes = query.dtype, key.dtype, value.dtype, output.dtype
        return self.layer, self.number, rest, inputs, output.shape, output.stride(), dtypes, query.device

    @property
    def unchanged(self) -> bool:
        """Whether nobody wrote into its tensors since the call."""
        return self.versions == tuple([x._version for x in self.tensors])


@dataclass(slots=True, eq=False)
class Pending:
    """The calls of one forward that are still to be handed on, and what they hold."""

    calls: list[_Raw] = field(default_factory=list)
    bytes: int = 0
    stream: int = 0


@dataclass(slots=True, eq=False)
class KeptLayers:
    """Of which layers calls are kept, and of which not, and why."""

    layers: set[str] = field(default_factory=set)
    left_out: dict[str, str] = field(default_factory=dict)

    def leave_out(self, layer: str, error: Exception) -> None:
        """Keep no further call of a layer."""
        known = isinstance(error, Unmeasurable)
        self.left_out[layer] = str(error) if known else f"{type(error).__name__}: {error}"


class Keeper:
    """Keeps the calls of forwards and hands them on.

    describe: (layer, number, describe, output) -> description and tensors, None for a call that is not kept.
    deliver: gets calls of one forward, on the thread that made them.
    """

    def __init__(
        self,
        describe: Callable[..., tuple[KeptCall, Tensors] | None],
        deliver: Callable[[KeptForward], None],
    ):
        self._describe = describe
        self._deliver = deliver
        # The latest calls that could be used again, by the first layer and how many there were.
        self._again: dict[tuple[str, int], _Again] = {}

    def add(
        self,
        place: tuple[Forward, int, Pending | None],
        layer: str,
        describe: Callable[[], AttentionCall],
        plain: Plain | None,
        output: Any,
    ) -> None:
        """Take in a call. place: its forward, its number there, and what is pending of it, None if no end is told."""
        forward, number, pending = place
        known = None
        if plain is None or type(output) is not Tensor or _is_cast(plain.query):
            # A mask may be overwritten, and autocast be left, before the forward ends.
            known, plain = self._describe(layer, number, describe, output), None
            if known is None:
                return
            tensors: tuple[Tensor, ...] = tuple([x for x in known[1] if x is not None])
        else:
            tensors = plain.query, plain.key, plain.value, output
        if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return  # a CUDA graph can take in no table of addresses
        if pending is None or not _saved(output, tensors):
            self._hand_on(forward, [_Raw(layer, number, describe, plain, output, known, tensors, ())])
            return
        versions = tuple([x._version for x in tensors])
        stream = compat.current_stream(tensors[0].device)
        if pending.calls and stream != pending.stream:
            self.flush(forward, pending)
        pending.stream = stream
        pending.calls.append(_Raw(layer, number, describe, plain, output, known, tensors, versions))
        pending.bytes += 4 * tensors[0].nbytes
        if pending.bytes > MOST_BYTES:
            self.flush(forward, pending)

    def flush(self, forward: Forward, pending: Pending) -> None:
        """Hand on what is pending, but for calls whose tensors were overwritten."""
        calls, pending.calls, pending.bytes = pending.calls, [], 0
        calls = [call for call in calls if call.unchanged]
        if not calls:
            return
        device = calls[0].tensors[0].device
        if compat.current_stream(device) == pending.stream:
            self._hand_on(forward, calls)
        else:
            with torch.cuda.stream(torch.cuda.ExternalStream(pending.stream, device)):
                self._hand_on(forward, calls)

    def forget(self) -> None:
        """Make all descriptions anew."""
        self._again.clear()

    def _hand_on(self, forward: Forward, calls: list[_Raw]) -> None:
        signatures = [call.signature() for call in calls]
        place = calls[0].layer, len(calls)
        again = self._again.get(place)
        if again is not None and again.signatures == signatures:
            tensors = [_viewed(call.tensors, views) for call, views in zip(calls, again.views)]
            self._deliver(KeptForward(forward, again.calls, tensors, again.prepared))
            return
        described = [
            call.known or self._describe(call.layer, call.number, call.describe, call.output)
            for call in calls
        ]
        found = [x for x in described if x is not None]
        if not found:
            return
        kept = KeptForward(forward, [call for call, _ in found], [tensors for _, tensors in found], {})
        views = [_views(call, one) for call, one in zip(calls, found)]
        if None not in described and None not in signatures and None not in views:
            self._again[place] = _Again(signatures, kept.calls, views, kept.prepared)
        self._deliver(kept)


#: Shape and strides of a description's tensor, None where they are those of the model's own.
_View = tuple[tuple[int, ...], tuple[int, ...]] | None


class _Again(NamedTuple):
    """What can be used again for calls of these signatures."""

    signatures: list[Hashable]
    calls: Sequence[KeptCall]
    views: list[Any]  # for each call a list of four _View
    prepared: dict[int, Any]


def _views(raw: _Raw, described: tuple[KeptCall, Tensors]) -> list[_View] | None:
    """How the model's own tensors stand for those of the description, in a later forward too; None if they do not."""
    call, tensors = described
    if call.left_out is not None or len(raw.tensors) != len(tensors):
        return None
    views: list[_View] = []
    for own, mine in zip(raw.tensors, tensors):
        if mine is None or mine.data_ptr() != own.data_ptr() or mine.dtype != own.dtype:
            return None
        same = mine.shape == own.shape and mine.stride() == own.stride()
        views.append(None if same else (tuple(mine.shape), mine.stride()))
    return views


def _viewed(tensors: Sequence[Tensor], views: Sequence[_View]) -> Any:
    if views.count(None) == len(views):
        return tensors
    with torch.no_grad():
        return tuple([x if view is None else x.as_strided(*view) for x, view in zip(tensors, views)])


def described(
    layer: str, number: int, call: AttentionCall, result: Any, padding: Padding
) -> tuple[KeptCall, Tensors]:
    """A call that gave `result`, checked and cast. Raises Unmeasurable, ValueError or TypeError if it cannot be."""
    if call.modify is not None:
        raise Unmeasurable("its scores are changed by a function")
    call.cast()
    options = call.validated()
    query, key, value = call.query.detach(), call.key.detach(), call.value.detach()
    batch, heads, num_queries, head_dim = query.shape
    if value.shape[1] != key.shape[1]:
        raise Unmeasurable(f"it has {key.shape[1]} key heads and {value.shape[1]} value heads")
    hidden = keys_hidden(options, batch, num_queries, key.shape[2])
    left_out = padding.left_out(layer, batch, num_queries, key.shape[2], hidden, query.device)
    kept = KeptCall(layer, number, heads, head_dim, query.dtype, query.device, options, left_out)
    return kept, (query, key, value, _by_heads(call.output(result), heads, value))


def _by_heads(output: Tensor | None, heads: int, value: Tensor) -> Tensor | None:
    """An output (B, H or 1, M, any) as (B, H, M, D_v), where it is of that size."""
    if output is None or output.dtype != value.dtype:
        return None
    width = value.shape[3]
    if output.shape[1] != heads:  # its heads are joined
        if output.shape[3] != heads * width:
            return None
        output = output[:, 0].unflatten(-1, (heads, width)).transpose(1, 2)
    return output.detach() if output.shape[3] == width else None


def _is_cast(query: Tensor) -> bool:
    """Whether autocast may change the call's dtype."""
    return query.dtype == torch.float32 and compat.any_autocast()


def _saved(output: Any, tensors: Sequence[Tensor]) -> bool:
    """Whether autograd keeps a call's tensors as they are until the backward."""
    seen = output.requires_grad if type(output) is Tensor else any([x.requires_grad for x in tensors])
    return seen and not compat.saves_elsewhere()
