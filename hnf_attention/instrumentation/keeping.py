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
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .. import compat
from ..engine.extremes import Tensors
from ..reference.options import Options
from ..tracing import captured, without_dispatch_modes
from .call import AttentionCall, Unmeasurable, keys_hidden
from .layer_state import LayerState
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
    prepared: WeakKeyDictionary[object, Any]


#: A description, and the tensors of the call.
Described = tuple[KeptCall, Tensors]


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

    def signature(self) -> Hashable:
        """Equal for calls whose descriptions are equal; None where only the description says it."""
        plain = self.plain
        if plain is None:
            return None
        query, key, value, output = self.tensors
        inputs = query.shape, query.stride(), key.shape, key.stride(), value.shape, value.stride()
        dtypes = query.dtype, key.dtype, value.dtype, output.dtype
        return (
            self.layer,
            self.number,
            plain.rest,
            inputs,
            output.shape,
            output.stride(),
            dtypes,
            query.device,
        )

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
        mine = self.all
        if self.versions != tuple([compat.version(x) for x in mine]):
            return False
        return all([x.untyped_storage().nbytes() for x in mine])


@dataclass(slots=True, eq=False)
class Pending:
    """The calls of one forward that are still to be handed on, and what they hold."""

    calls: list[_Raw] = field(default_factory=list)
    bytes: int = 0
    stream: int = 0


class KeptLayers:
    """The layers of which calls are not kept now, and why."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self._states: dict[str, LayerState] = {}  # of these layers

    def rests(self, layer: str) -> bool:
        """Whether the call that begins is left out."""
        state = self._states.get(layer)
        return state is not None and state.rests()

    def fail(self, layer: str, error: Exception) -> None:
        """Leave out the next calls of a layer, or all of them if nothing else can come of it."""
        known = isinstance(error, Unmeasurable)
        self.reasons[layer] = str(error) if known else f"{type(error).__name__}: {error}"
        state = self._states.setdefault(layer, LayerState())
        state.rest()
        state.measuring_failed = isinstance(error, Unmeasurable) and error.lasting

    def succeed(self, layer: str) -> None:
        """Note that a call was kept."""
        self.reasons.pop(layer, None)
        self._states.pop(layer, None)


class Keeper:
    """Keeps the calls of forwards and hands them on.

    deliver: gets calls of one forward, on the thread that made them.
    """

    def __init__(self, deliver: Callable[[KeptForward], None]):
        self._deliver = deliver
        # The latest calls that could be used again, by the first layer and how many there were.
        self._again: dict[tuple[str, int], _Again] = {}

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
        if plain is None or type(output) is not Tensor or _is_cast(plain):
            # A mask may be overwritten, and autocast be left, before the forward ends.
            known = make()
            if known is None:
                return
            tensors = tuple([x for x in known[1] if x is not None])
            raw = _Raw(layer, number, None, None, known, tensors, ())
            copied = plain is not None and _is_cast(plain)
        else:
            tensors = plain.query, plain.key, plain.value, output
            raw, copied = _Raw(layer, number, plain, make, None, tensors, ()), False
        if pending is None or copied or not _saved(output, tensors):
            if pending is not None:
                self.flush(forward, pending)  # readers get the calls in their order
            self._hand_on(forward, [raw])
            return
        raw.versions = tuple([compat.version(x) for x in raw.all])
        stream = compat.current_stream(tensors[0].device)
        if pending.calls and stream != pending.stream:
            self.flush(forward, pending)
        pending.stream = stream
        pending.calls.append(raw)
        pending.bytes += 4 * tensors[0].nbytes
        if raw.known is not None:
            pending.bytes += sum([x.nbytes for x in raw.all[len(tensors) :]])
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
        # What happens here is no part of the model: a selective checkpoint counts the operators that it sees.
        with without_dispatch_modes():
            self._described(forward, calls)

    def _described(self, forward: Forward, calls: list[_Raw]) -> None:
        signatures = [call.signature() for call in calls]
        place = calls[0].layer, len(calls)
        again = self._again.get(place)
        if again is not None and again.signatures == signatures:
            tensors = [viewed(call.tensors, views) for call, views in zip(calls, again.views)]
            self._deliver(KeptForward(forward, again.calls, tensors, again.prepared))
            return
        described = [call.known if call.make is None else call.make() for call in calls]
        found = [x for x in described if x is not None]
        if not found:
            return
        kept = KeptForward(
            forward, [call for call, _ in found], [tensors for _, tensors in found], WeakKeyDictionary()
        )
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
        same = mine.shape == own.shape and mine.stride() == own.stride()
        views.append(None if same else (tuple(mine.shape), mine.stride()))
    return views


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


def _is_cast(plain: Plain) -> bool:
    """Whether autocast may change a dtype of the call."""
    if not compat.any_autocast():
        return False
    dtype = torch.get_autocast_dtype(plain.query.device.type)
    return not plain.query.dtype == plain.key.dtype == plain.value.dtype == dtype


def _saved(output: Any, tensors: Sequence[Tensor]) -> bool:
    """Whether autograd keeps a call's tensors as they are until the backward.

    A parameter's memory, and so that of its views, is freed by FSDP when its module has run.
    """
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not (isinstance(first, Tensor) and first.requires_grad) or compat.saves_elsewhere():
        return False
    return not any([compat.learned(x) for x in tensors[:3]])
