"""Smaller versions of one operation's call: one head, one row, one element of a list."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import compat
from ..diagnosis.triage.case import Numbers
from .recorder import map_tensors


@dataclass(frozen=True)
class Call:
    """The arguments of one call, by name and in order."""

    arguments: list[tuple[str, Any]]

    def copied(self) -> Call:
        return Call([(name, map_tensors(x, lambda y: y.clone())) for name, x in self.arguments])

    def map(self, change: Callable[[str, Any], Any]) -> Call:
        return Call([(name, change(name, x)) for name, x in self.arguments])

    def get(self, name: str) -> Any:
        return dict(self.arguments).get(name)

    def split(self, operator: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs): all by name, where the operator has names."""
        if compat.parameters_of(operator):
            return (), dict(self.arguments)
        return tuple(x for _, x in self.arguments), {}


def cuts(operator: Any, call: Call, numbers: Numbers) -> Iterator[Call]:
    """Smaller calls, the smallest first. Not every one shows the fault, or runs at all."""
    index, shape, name = numbers.index, numbers.shape, str(operator).split(".")[1].rstrip("_")
    if not index:
        return
    listed = numbers.result.partition("[")[2].rstrip("]")
    if listed.isdecimal():
        yield _of_list(call, int(listed))
        return
    if "scaled_dot_product" in name and len(shape) == 4:
        one = _one_head(call, index)
        yield _one_query(one, index[2])
        yield one
    elif name in ("bmm", "baddbmm") and len(shape) == 3 or name in ("mm", "addmm") and len(shape) == 2:
        yield call.map(_product(index, name))
    else:
        yield call.map(lambda _, x: _rows(x, index, shape))


def _of_list(call: Call, place: int) -> Call:
    """One element of each list of tensors, and of the lists as long as these."""
    length = max(len(x) for _, x in call.arguments if isinstance(x, (list, tuple)))

    def one(_: str, x: Any) -> Any:
        return [x[place]] if isinstance(x, (list, tuple)) and len(x) == length else x

    return call.map(one)


def _one_head(call: Call, index: tuple[int, ...]) -> Call:
    """One head of a fused attention. The index is in the output or in the gradient of q, k or v."""
    query, key = call.get("query"), call.get("key")
    group = max(1, query.shape[1] // max(1, key.shape[1]))

    def one(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dim() < 3:
            return x
        batch, head = min(index[0], x.shape[0] - 1), index[1]
        if name in ("key", "value"):
            head //= group
        head = min(head, x.shape[1] - 1)
        return x[batch : batch + 1, head : head + 1]

    return call.map(one)


def _one_query(call: Call, row: int) -> Call:
    def one(name: str, x: Any) -> Any:
        if isinstance(x, Tensor) and (name == "query" or (name.startswith("attn_") and x.dim() == 4)):
            return x[:, :, row : row + 1] if x.shape[2] > row else x
        return x

    return call.map(one)


def _product(index: tuple[int, ...], name: str) -> Callable[[str, Any], Any]:
    """One row and one column of a matrix product; what is added to it is left whole where it has no such row."""
    row, column = index[-2:]
    left = ("self", "mat1", "batch1") if name in ("mm", "bmm") else ("mat1", "batch1")

    def one(argument: str, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if len(index) == 3 and x.dim() == 3 and x.shape[0] > 1:
            x = x[index[0] : index[0] + 1]
        if argument in ("mat2", "batch2"):
            return x[..., column : column + 1]
        if argument in left:
            return x[..., row : row + 1, :]
        for dim, at in ((-2, row), (-1, column)):  # the summand, which broadcasts to the result
            if x.dim() >= -dim and x.shape[dim] > 1:
                x = x.narrow(dim, at, 1)
        return x

    return one


def _rows(value: Any, index: tuple[int, ...], shape: tuple[int, ...]) -> Any:
    """The row that the index is in, of tensors that broadcast to the shape."""
    if not isinstance(value, Tensor) or value.dim() > len(shape) or value.dim() == 0:
        return value
    skipped = len(shape) - value.dim()
    for dim in range(value.dim() - 1):
        size, at = value.shape[dim], index[dim + skipped]
        if size not in (1, shape[dim + skipped]):
            return value
        if size > 1:
            value = value.narrow(dim, at, 1)
    return value
