"""A forward that makes the calls of the forward before it, with other tensors, as training steps do.

Each call is compared with the one that is expected. If they are alike, its tensors are all that is kept of it. This
costs the host a third of a call that is described anew.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import compat
from ..errors import let_out


class Plain(NamedTuple):
    """A call of scaled_dot_product_attention without a mask, as the model made it.

    rest: all that describes the call beside its tensors.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    rest: Hashable


class Slot(NamedTuple):
    """What one call is expected to be.

    module: of the layer. rest: of `Plain`. inputs, output: of `layout_of_inputs` and `layout_of_output`.
    """

    module: weakref.ref[nn.Module]
    rest: Hashable
    inputs: Hashable
    output: Hashable


class Taken(NamedTuple):
    """The tensors of a call, and how often each was written to before."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    versions: tuple[int, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self[:4]


def layout_of_inputs(query: Tensor, key: Tensor, value: Tensor) -> Hashable:
    """Shapes, strides, dtypes and the device of a call's inputs."""
    return (
        query.shape,
        query.stride(),
        key.shape,
        key.stride(),
        value.shape,
        value.stride(),
        query.dtype,
        key.dtype,
        value.dtype,
        query.device,
    )


def layout_of_output(output: Tensor) -> Hashable:
    """Shape, strides and dtype of a call's output."""
    return output.shape, output.stride(), output.dtype


def unchanged(tensors: Sequence[Tensor], versions: tuple[int, ...]) -> bool:
    """Whether nobody wrote into the tensors since they had these versions, or freed their memory."""
    same = versions == versions_of(tensors)
    return same and all([x.untyped_storage().nbytes() for x in tensors])


def versions_of(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """How often each was written to."""
    return tuple([compat.version(x) for x in tensors])


def is_cast(plain: Plain) -> bool:
    """Whether autocast may change a dtype of the call."""
    if not compat.any_autocast():
        return False
    dtype = torch.get_autocast_dtype(plain.query.device.type)
    return not plain.query.dtype == plain.key.dtype == plain.value.dtype == dtype


class Expected:
    """The calls that a forward is expected to make, in their order, and those of them that it made.

    stream: of the calls, see `compat.current_stream`.
    """

    __slots__ = ("_left", "_next", "_slots", "stream", "taken", "whole")

    def __init__(self, slots: Sequence[Slot], whole: Any = None) -> None:
        self._slots, self._left, self.whole = slots, False, whole
        self._next: Plain | None = None
        self.taken: list[Taken] = []
        self.stream = 0

    @property
    def complete(self) -> bool:
        """Whether the forward made each of the calls, and no other one so far."""
        return not self._left and len(self.taken) == len(self._slots)

    def leave(self) -> None:
        """Expect nothing any more: the forward made another call."""
        self._left = True

    def begins(self, calls: Callable[[nn.Module | None], bool], plain: Plain | None) -> bool:
        """Whether the call that begins is the next one expected. calls: whether this module makes it."""
        place = len(self.taken)
        if self._left or plain is None or place >= len(self._slots):
            return False
        slot = self._slots[place]
        query, key, value, rest = plain
        try:
            alike = (
                slot.rest == rest
                and slot.inputs == layout_of_inputs(query, key, value)
                and not is_cast(plain)
            )
        except Exception as error:  # nested tensors have no sizes; the monitor never ends a run
            let_out(error)
            return False
        if not alike or not calls(slot.module()):
            return False
        self._next = plain
        return True

    def take(self, output: Any) -> bool:
        """Keep the call that began, which gave `output`. False if its tensors may change before the forward ends."""
        plain, self._next = self._next, None
        slot = self._slots[len(self.taken)]
        if plain is None or type(output) is not Tensor or slot.output != layout_of_output(output):
            return False
        if not output.requires_grad or compat.saves_elsewhere() or _capturing(output):
            return False
        stream = compat.current_stream(output.device)
        if self.taken and stream != self.stream:
            return False
        self.stream = stream
        query, key, value, _ = plain
        self.taken.append(Taken(query, key, value, output, versions_of((query, key, value, output))))
        return True


def _capturing(output: Tensor) -> bool:
    return output.is_cuda and torch.cuda.is_current_stream_capturing()
