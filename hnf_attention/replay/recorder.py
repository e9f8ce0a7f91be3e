"""Records every operation of a run, with the smallest and largest number of each tensor, read once at its end."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .. import compat
from ..diagnosis.triage.records import BACKWARD, OPTIMIZER, SCALING, WITHOUT_NUMBERS, Operation, TensorRecord
from .owners import Owners

#: What a fused attention hands to its backward, by the parameters' names.
_STATISTICS = frozenset(("logsumexp", "softmax_logsumexp", "softmax_lse", "lse", "entropy"))
#: Operations that read nothing of what they write to.
_OVERWRITES = frozenset(
    [
        "copy_",
        "fill_",
        "zero_",
        "normal_",
        "uniform_",
        "random_",
        "bernoulli_",
        "exponential_",
        "set_",
        "resize_",
    ]
)


class Captured(NamedTuple):
    """One operation with its tensors, as copies.

    operator: of torch.ops. args, kwargs: as it was given them, before it ran. results: what it returned and wrote, by
    name.
    shapes: those that the first result is viewed in by the operations that follow at once.
    """

    operator: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: dict[str, Tensor]
    shapes: list[tuple[int, ...]]


class Wanted(NamedTuple):
    """An operation to capture, by what stays the same in another run.

    name, module, phase: as of `Operation`. before: how many operations of the same three run before it.
    """

    name: str
    module: str | None
    phase: str
    before: int


class Recorder(compat.DispatchMode):
    """A context inside which operations are recorded.

    owners: say which module and which part of a step makes a call.
    capture: the operation whose tensors are copied; then no number of the others is looked at.
    went_back, stepped, scaled: whether a backward ran, the step of an optimizer, a loss scaler.
    """

    def __init__(self, owners: Owners, capture: Wanted | None = None):
        super().__init__()
        self._owners, self._capture = owners, capture
        self.operations: list[Operation] = []
        self.captured: Captured | None = None
        self.went_back = self.stepped = self.scaled = False
        self._memories: dict[int, int] = {}  # by address
        self._kept: list[StorageWeakRef] = []  # so that no address is given away again
        self._numbers: list[tuple[TensorRecord, Tensor, Tensor]] = []
        self._viewed: int | None = None  # memory of the captured result
        self._last_view = 0  # the number of operations up to which its views are of interest
        self._passed = 0  # operations that are like the wanted one

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        given = list(_named(operator, args, kwargs))
        if not all(_is_plain(x) for _, x in given):
            return NotImplemented  # the tensors' own class computes it by operations that are seen
        if torch.compiler.is_compiling():
            return operator(*args, **kwargs)
        inputs = [self._look(name, x, operator) for name, x in given if self._reads(operator, name)]
        written = _written(operator)
        module, phase = self._owners.place()
        self.went_back |= phase == BACKWARD
        self.stepped |= phase == OPTIMIZER
        self.scaled |= phase == SCALING
        wanted = self._capture
        is_like = wanted is not None and wanted[:3] == (str(operator), module, phase)
        now = wanted is not None and is_like and wanted.before == self._passed
        copied = (_copied(args), _copied(kwargs)) if now else None
        result = operator(*args, **kwargs)
        outputs = named_results(operator, args, kwargs, result)
        if not all(_is_plain(x) for _, x in outputs):
            return result
        known = {self.memory(x) for _, x in given}
        if not written and outputs and all(self.memory(x) in known for _, x in outputs):
            self._saw_view(outputs[0][1])
            return result
        self._passed += is_like
        self.operations.append(
            Operation(
                len(self.operations),
                str(operator),
                module,
                phase,
                inputs,
                [self._look(name, x, operator, made=True) for name, x in outputs],
                tuple(_infinite(args, kwargs)),
            )
        )
        if copied is not None:
            self._viewed = self.memory(outputs[0][1]) if outputs else None
            self._last_view = len(self.operations) + 2
            self.captured = Captured(operator, *copied, {name: x.detach().clone() for name, x in outputs}, [])
        return result

    def memory(self, tensor: Tensor) -> int:
        """The number of the memory that holds a tensor."""
        reference = StorageWeakRef(tensor.untyped_storage())
        number = self._memories.get(reference.cdata)
        if number is None:
            number = self._memories[reference.cdata] = len(self._memories)
            self._kept.append(reference)
        return number

    def add(self, tensor: Tensor, name: str) -> TensorRecord:
        """Look at a tensor outside of any operation."""
        return self._look(name, tensor)

    def read(self) -> None:
        """Fill in the numbers: one copy from each device."""
        groups: dict[tuple[torch.device, torch.dtype], list[tuple[TensorRecord, Tensor, Tensor]]] = {}
        for entry in self._numbers:
            groups.setdefault((entry[1].device, entry[1].dtype), []).append(entry)
        for entries in groups.values():
            pairs = torch.stack([torch.stack(entry[1:]) for entry in entries]).cpu().double().tolist()
            for (record, *_), (least, most) in zip(entries, pairs):
                record.least, record.most = least, most
        self._numbers.clear()

    def _reads(self, operator: Any, name: str) -> bool:
        return not (name in _written(operator) and (_packet(operator) in _OVERWRITES or name == "out"))

    def _look(self, name: str, tensor: Tensor, operator: Any = None, made: bool = False) -> TensorRecord:
        dtype = str(tensor.dtype).removeprefix("torch.")
        record = TensorRecord(name, self.memory(tensor), tuple(tensor.shape), dtype)
        blank = operator is not None and _without_meaning(operator, name, made)
        if self._capture is None and not blank and _has_numbers(tensor):
            with torch.no_grad():
                plain = tensor.detach()
                plain = torch.view_as_real(plain) if plain.is_complex() else plain
                plain = plain.float() if plain.element_size() == 1 else plain
                self._numbers.append((record, *plain.aminmax()))
        return record

    def _saw_view(self, tensor: Tensor) -> None:
        captured = self.captured
        if captured is None or len(self.operations) > self._last_view:
            return
        if self.memory(tensor) == self._viewed:
            captured.shapes.append(tuple(tensor.shape))


def _without_meaning(operator: Any, name: str, made: bool) -> bool:
    """Whether a tensor that is not finite means nothing: blank memory, or statistics of a fused attention.

    PyTorch's memory-efficient attention returns an lse that is +inf in rows which pad it, and its backward reads it.
    """
    packet = _packet(operator)
    if made and packet in WITHOUT_NUMBERS:
        return True
    if "attention" not in str(operator):
        return False
    return name in _STATISTICS or (made and "backward" not in packet and name not in ("0", "out"))


def _is_plain(tensor: Tensor) -> bool:
    """Whether the tensor's class leaves its operations to PyTorch."""
    return type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__


def _packet(operator: Any) -> str:
    return str(operator).split(".")[1]


@functools.cache
def _parameters(operator: Any) -> tuple[tuple[str, ...], frozenset[str]]:
    """(the names of an operator's parameters, those that a call writes to)."""
    found = compat.parameters_of(operator)
    return tuple(name for name, _ in found), frozenset(name for name, writes in found if writes)


def _written(operator: Any) -> frozenset[str]:
    return _parameters(operator)[1]


def _named(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors among the arguments by the names of their parameters; 'name[2]' for those in lists."""
    for name, value in named_arguments(operator, args, kwargs):
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, (list, tuple)):
            for place, x in enumerate(value):
                if isinstance(x, Tensor):
                    yield f"{name}[{place}]", x


def named_arguments(
    operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """All arguments of a call by the names of their parameters."""
    names = _parameters(operator)[0]
    yield from ((names[place] if place < len(names) else str(place), x) for place, x in enumerate(args))
    yield from kwargs.items()


def named_results(
    operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
) -> list[tuple[str, Tensor]]:
    """What a call wrote to, by the parameters' names, and then what it returned, by places from "0"."""
    written = _written(operator)
    changed = [(name, x) for name, x in _named(operator, args, kwargs) if name.partition("[")[0] in written]
    names = {id(x) for _, x in changed}
    return changed + [(str(place), x) for place, x in enumerate(_tensors(result)) if id(x) not in names]


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    part: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if part is None else part()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for x in value:
            yield from _tensors(x)


def _has_numbers(tensor: Tensor) -> bool:
    return (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel() > 0 and not tensor.is_meta


def _infinite(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[float]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, float) and not math.isfinite(value):
            yield value


def _copied(value: Any) -> Any:
    """The same arguments with copies of their tensors."""
    return map_tensors(value, lambda x: x.detach().clone())


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same lists, tuples and dicts with each tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(x, change) for x in value)
    if isinstance(value, dict):
        return {name: map_tensors(x, change) for name, x in value.items()}
    return value
