"""Attention calls that are kept until their forward ends: what the extremes of every step are read from.

Nothing runs between the model's own kernels. At the end of a forward all its calls are handed on together. Under
autograd their tensors are saved for the backward anyway. Where that is not so, a call is handed on at once.

A training step makes the calls of the step before, with other tensors. Descriptions and what readers made of them are
therefore used again, as long as shapes, strides and options stay the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .. import compat
from ..engine.extremes import Tensors
from ..reference.options import Options
from ..tracing import captured, without_dispatch_modes
from .call import AttentionCall, Unmeasurable, keys_hidden
from .expected import (
    Expected,
    Plain,
    Slot,
    is_cast,
    layout_of_inputs,
    layout_of_output,
    unchanged,
    versions_of,
)
from .measurement import Forward
from .padding import Padding

#: So much of the tensors of one forward is kept. Where autograd saves other tensors, this is what keeping costs.
MOST_BYTES = 2**30


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
    prepared: WeakKeyDictionary[object, Any]


#: A description, and the tensors of the call.
Described = tuple[KeptCall, Tensors]


class _Signature(NamedTuple):
    """What the description of a call follows from."""

    layer: str
    number: int
    rest: Hashable
    inputs: Hashable
    output: Hashable


@dataclass(slots=True, eq=False)
class _Raw:
    """A call as it was made.

    make: makes its description and tensors. known: these, where they could not be made later. tensors: the model's own.
    versions: of the tensors, and of the mask and the sinks if they are known.
    """

    layer: str
    number: int
    plain: Plain | None
    make: Callable[[], Described | None] | None
    known: Described | None
    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]

    def signature(self) -> _Signature | None:
        """Equal for calls whose descriptions are equal; None where only the description says it."""
        plain = self.plain
        if plain is None:
            return None
        inputs, output = layout_of_inputs(*self.tensors[:3]), layout_of_output(self.tensors[3])
        return _Signature(self.layer, self.number, plain.rest, inputs, output)

    @property
    def all(self) -> tuple[Tensor, ...]:
        """The tensors that have to be as they were."""
        if self.known is None:
            return self.tensors
        options = self.known[0].options
        return *self.tensors, *[x for x in (options.attn_mask, options.sinks) if x is not None]

    @property
    def unchanged(self) -> bool:
        """Whether nobody wrote into them since the call, or freed their memory."""
        return unchanged(self.all, self.versions)


@dataclass(slots=True, eq=False)
class Pending:
    """The calls of one forward that are still to be handed on, and what they hold.

    expected: those that the forward before made, too. parted: some calls were handed on already.
    """

    calls: list[_Raw] = field(default_factory=list)
    bytes: int = 0
    stream: int = 0
    expected: Expected | None = None
    parted: bool = False


class Keeper:
    """Keeps the calls of forwards and hands them on.

    deliver: gets calls of one forward, on the thread that made them.
    """

    def __init__(self, deliver: Callable[[KeptForward], None]):
        self._deliver = deliver
        # The latest calls that could be used again, by the first layer and how many there were.
        self._again: dict[tuple[str, int], _Again] = {}
        # Those of the latest forward, if all its calls could be.
        self._expects: tuple[_Again, list[Slot]] | None = None

    def expected(self) -> Expected | None:
        """What a forward that begins is expected to do, None for nothing that is known."""
        known = self._expects
        return None if known is None else Expected(known[1], known[0])

    def add(
        self,
        place: tuple[Forward, int, Pending | None],
        layer: str,
        plain: Plain | None,
        make: Callable[[], Described | None],
        output: Any,
    ) -> None:
        """Take in a call. place: its forward, its number there, and what is pending of it, None if no end is told.

        plain: None for a call that has to be described now. make: makes the description and the tensors.
        """
        forward, number, pending = place
        if _capturing(output):
            return  # a CUDA graph can take in no table of addresses
        if plain is None or type(output) is not Tensor or is_cast(plain):
            # A mask may be overwritten, and autocast be left, before the forward ends.
            known = make()
            if known is None:
                return
            tensors = tuple([x for x in known[1] if x is not None])
            raw = _Raw(layer, number, None, None, known, tensors, ())
            copied = plain is not None and is_cast(plain)
        else:
            tensors = plain.query, plain.key, plain.value, output
            raw, copied = _Raw(layer, number, plain, make, None, tensors, ()), False
        if pending is None or copied or not _saved(output, tensors):
            if pending is not None:
                self.flush(forward, pending)  # readers get the calls in their order
                pending.parted = True
            self._hand_on(forward, [raw])
            return
        raw.versions = versions_of(raw.all)
        stream = compat.current_stream(tensors[0].device)
        if pending.expected is not None:
            pending.expected.leave()
            if pending.expected.taken and stream != pending.expected.stream:
                self.flush(forward, pending)
        if pending.calls and stream != pending.stream:
            self.flush(forward, pending)
        pending.stream = stream
        pending.calls.append(raw)
        pending.bytes += 4 * tensors[0].nbytes
        if raw.known is not None:
            pending.bytes += sum([x.nbytes for x in raw.all[len(tensors) :]])
        if pending.bytes > MOST_BYTES:
            self.flush(forward, pending)

    def finish(
        self, forward: Forward, pending: Pending, modules_of: Callable[[], Mapping[str, nn.Module]]
    ) -> None:
        """Hand on what is pending at the end of a forward, and expect the same calls of the next one.

        modules_of: the model's modules by name.
        """
        expected = pending.expected
        taken = expected is not None and bool(expected.taken)
        if not pending.calls and (not taken or (expected is not None and expected.complete)):
            # The forward made every expected call, or its calls were measured and not kept.
            self.flush(forward, pending)
            return
        whole = not pending.parted and not taken
        again, known = self.flush(forward, pending), self._expects
        if whole and known is not None and again is known[0]:
            return
        self._expects = None
        layers = [] if again is None else [signature.layer for signature in again.signatures]
        # Two calls of a layer are told apart by the invocations of its module, which nobody looks at here.
        forgotten = not any(again is x for x in self._again.values())  # as where handing on failed
        if not whole or again is None or forgotten or len(set(layers)) < len(layers):
            return
        named = modules_of()
        if all(layer in named for layer in layers):
            slots = [
                Slot(weakref.ref(named[signature.layer]), signature.rest, signature.inputs, signature.output)
                for signature in again.signatures
            ]
            self._expects = again, slots

    def flush(self, forward: Forward, pending: Pending) -> _Again | None:
        """Hand on what is pending, but for calls whose tensors were overwritten. Returns what can be used again."""
        expected, pending.expected = pending.expected, None
        if expected is not None:
            expected.leave()
            if expected.taken:
                pending.parted = True
                with _on_stream(expected.taken[0].query.device, expected.stream):
                    self._hand_on_expected(forward, expected)
        calls, pending.calls, pending.bytes = pending.calls, [], 0
        kept = [call for call in calls if call.unchanged]
        if not kept:
            return None
        with _on_stream(kept[0].tensors[0].device, pending.stream):
            again = self._hand_on(forward, kept)
        return again if len(kept) == len(calls) else None

    def forget(self) -> None:
        """Make all descriptions anew."""
        self._again.clear()
        self._expects = None

    def _hand_on_expected(self, forward: Forward, expected: Expected) -> None:
        whole, taken = expected.whole, expected.taken
        places = [place for place, call in enumerate(taken) if unchanged(call.tensors, call.versions)]
        with without_dispatch_modes():
            tensors = [viewed(taken[place].tensors, whole.views[place]) for place in places]
            if len(places) == len(whole.calls):
                self._deliver(KeptForward(forward, whole.calls, tensors, whole.prepared))
            elif places:
                calls = [whole.calls[place] for place in places]
                self._deliver(KeptForward(forward, calls, tensors, WeakKeyDictionary()))

    def _hand_on(self, forward: Forward, calls: list[_Raw]) -> _Again | None:
        # What happens here is no part of the model: a selective checkpoint counts the operators that it sees.
        with without_dispatch_modes():
            return self._described(forward, calls)

    def _described(self, forward: Forward, calls: list[_Raw]) -> _Again | None:
        """Hand on the calls. Returns what can be used again for calls like them, None where that is not all."""
        signatures = [call.signature() for call in calls]
        place = calls[0].layer, len(calls)
        again = self._again.get(place)
        if again is not None and again.signatures == signatures:
            tensors = [viewed(call.tensors, views) for call, views in zip(calls, again.views)]
            self._deliver(KeptForward(forward, again.calls, tensors, again.prepared))
            return again
        described = [call.known if call.make is None else call.make() for call in calls]
        found = [x for x in described if x is not None]
        if not found:
            return None
        kept = KeptForward(
            forward, [call for call, _ in found], [tensors for _, tensors in found], WeakKeyDictionary()
        )
        views = [_views(call, one) for call, one in zip(calls, found)]
        again, known = None, [signature for signature in signatures if signature is not None]
        if None not in described and len(known) == len(calls) and None not in views:
            again = self._again[place] = _Again(known, kept.calls, views, kept.prepared)
        self._deliver(kept)
        return again


@contextmanager
def _on_stream(device: torch.device, stream: int) -> Iterator[None]:
    """Launch on this stream, see `compat.current_stream`."""
    if compat.current_stream(device) == stream:
        yield
    else:
        with torch.cuda.stream(torch.cuda.ExternalStream(stream, device)):
            yield


#: Shape and strides of a description's tensor, None where they are those of the model's own.
_View = tuple[tuple[int, ...], tuple[int, ...]] | None


class _Again(NamedTuple):
    """What can be used again for calls of these signatures."""

    signatures: list[_Signature]
    calls: Sequence[KeptCall]
    views: list[Any]  # for each call a list of four _View
    prepared: WeakKeyDictionary[object, Any]


def _views(raw: _Raw, described: Described) -> list[_View] | None:
    """How the model's own tensors stand for those of the description, in a later forward too; None if they do not."""
    call, tensors = described
    return None if call.left_out is not None else views_of(raw.tensors, tensors)


def views_of(tensors: Sequence[Tensor], described: Sequence[Tensor | None]) -> list[Any] | None:
    """How a call's own tensors stand for those of its description; None if they do not, as where one was copied."""
    if len(tensors) != len(described):
        return None
    views: list[_View] = []
    for own, mine in zip(tensors, described):
        if mine is None or mine.data_ptr() != own.data_ptr() or mine.dtype != own.dtype:
            return None
        views.append(None if _alike(own, mine) else (tuple(mine.shape), mine.stride()))
    return views


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether shapes and strides are equal; a dimension of size 1 may have any stride."""
    steps = zip(one.shape, one.stride(), other.stride())
    return one.shape == other.shape and all(size == 1 or mine == theirs for size, mine, theirs in steps)


def viewed(tensors: Sequence[Tensor], views: Sequence[_View]) -> Any:
    """The tensors as `views_of` found them."""
    if views.count(None) == len(views):
        return tensors
    with torch.no_grad():
        return tuple([x if view is None else x.as_strided(*view) for x, view in zip(tensors, views)])


def described(layer: str, number: int, call: AttentionCall, result: Any, padding: Padding) -> Described:
    """A call that gave `result`, checked and cast. Raises Unmeasurable, ValueError or TypeError if it cannot be."""
    if call.modify is not None:
        raise Unmeasurable("its scores are changed by a function")
    if call.copied:  # copies of every step would fill the memory
        raise Unmeasurable(call.copied)
    call.cast()
    options = call.validated()
    query, key, value = call.query.detach(), call.key.detach(), call.value.detach()
    batch, heads, num_queries, head_dim = query.shape
    if value.shape[1] != key.shape[1]:
        raise Unmeasurable(f"it has {key.shape[1]} key heads and {value.shape[1]} value heads")
    hidden = keys_hidden(options, batch, num_queries, key.shape[2])
    left_out = padding.left_out(layer, batch, num_queries, key.shape[2], hidden, query.device)
    kept = KeptCall(layer, number, heads, head_dim, query.dtype, query.device, options, left_out)
    return kept, (query, key, value, by_heads(call.output(result), heads, value))


def by_heads(output: Tensor | None, heads: int, value: Tensor) -> Tensor | None:
    """An output (B, H or 1, M, any) as (B, H, M, D_v), where it is of that size."""
    if output is None or output.dtype != value.dtype:
        return None
    width = value.shape[3]
    if output.shape[1] != heads:  # its heads are joined
        if output.shape[3] != heads * width:
            return None
        output = output[:, 0].unflatten(-1, (heads, width)).transpose(1, 2)
    return output.detach() if output.shape[3] == width else None


def _capturing(output: Any) -> bool:
    return (type(output) is not Tensor or output.is_cuda) and captured()


def _saved(output: Any, tensors: Sequence[Tensor]) -> bool:
    """Whether autograd keeps a call's tensors as they are until the backward.

    A parameter's memory, and so that of its views, is freed by FSDP when its module has run.
    """
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not (isinstance(first, Tensor) and first.requires_grad) or compat.saves_elsewhere():
        return False
    return not any([compat.learned(x) for x in tensors[:3]])
