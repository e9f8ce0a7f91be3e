"""Replacing a function in place, and putting it back: exact, shared, and never over somebody else."""

from __future__ import annotations

import functools
import importlib
import inspect
import operator
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType
from typing import Any

from torch import nn

_lock = threading.RLock()  # re-entrant: a garbage collection inside it may release a patch
_MARK = "_hnf_attention_patch"


class Patch:
    """A function replaced while at least one user holds it.

    A second user of the same place shares the first one's replacement. The last `release` puts the
    original back, unless somebody else has replaced ours meanwhile: theirs stays, and ours, which
    they may still call, hands every call on to the original.
    """

    def __init__(self, read: Callable[[], Callable], write: Callable[[Callable], None]):
        self._read, self._write = read, write
        self._users = 0

    @staticmethod
    def acquire(
        read: Callable[[], Callable],
        write: Callable[[Callable], None],
        replacement: Callable[[Callable], Callable],
    ) -> Patch:
        """Replace what `read` returns by `replacement(original)`, or share the patch already there."""
        with _lock:
            current = read()
            patch = getattr(current, _MARK, None)
            # The mark alone proves nothing: functools.wraps copies it to a wrapper around ours.
            if patch is None or patch._ours is not current:
                _dynamo_table()
                patch = Patch(read, write)
                patch._original, patch._ours = current, replacement(current)
                setattr(patch._ours, _MARK, patch)
                write(patch._ours)
            patch._users += 1
            return patch

    @staticmethod
    def everywhere(
        place: Any, name: str, replacement: Callable[[Callable], Callable], modules: Iterable[nn.Module]
    ) -> list[Patch]:
        """Replace the attribute `name` of `place`, and every global that the files of these modules imported it as."""
        inherited = None if name in vars(place) else getattr(place, name)
        write = functools.partial(_write, place, name, inherited)
        first = Patch.acquire(functools.partial(getattr, place, name), write, replacement)
        patches = [first]
        for space in namespaces(modules):
            if space is vars(place):
                continue
            for name, value in list(space.items()):
                patch = getattr(value, _MARK, None) if isinstance(value, FunctionType) else None
                if value is first._original or (patch is not None and patch._original is first._original):
                    read = functools.partial(operator.getitem, space, name)
                    write = functools.partial(operator.setitem, space, name)
                    patches.append(Patch.acquire(read, write, replacement))
        return patches

    def release(self) -> None:
        """Give up one use; the last one restores the original."""
        with _lock:
            self._users -= 1
            if self._users == 0 and self._read() is self._ours:
                self._write(self._original)
                table = _dynamo_table()
                if self._ours in table():  # it was made anew meanwhile
                    table.cache_clear()


def _dynamo_table() -> Callable[[], dict]:
    """The table of torch's own functions, which Dynamo puts into its graphs without looking inside.

    It is made once, from what stands under their names, and has to be made before ours do: Dynamo is to look
    inside of those. Whoever makes an optimizer or a Hugging Face model has imported Dynamo already.
    """
    table = importlib.import_module("torch._dynamo.trace_rules").get_torch_obj_rule_map
    table()
    return table


def _write(place: Any, name: str, inherited: Any, function: Callable) -> None:
    if function is inherited:  # as a class has it from its base
        delattr(place, name)
    else:
        setattr(place, name, function)


def methods(cls: type) -> Iterator[FunctionType]:
    """The methods of a module's class and of its bases below nn.Module."""
    for base in cls.__mro__:
        if base is nn.Module:
            return
        for attribute in vars(base).values():
            if isinstance(attribute, FunctionType):
                method = inspect.unwrap(attribute)
                if isinstance(method, FunctionType):
                    yield method


def namespaces(modules: Iterable[nn.Module]) -> list[dict[str, Any]]:
    """The globals of the files that the classes of these modules come from, each once."""
    found = {id(m.__globals__): m.__globals__ for cls in {type(x) for x in modules} for m in methods(cls)}
    return list(found.values())


def classes(modules: Iterable[nn.Module]) -> set[type]:
    """The classes of these modules and their bases, those of torch.nn left out."""
    found = {
        base for cls in {type(x) for x in modules} for base in cls.__mro__ if issubclass(base, nn.Module)
    }
    return {cls for cls in found if not cls.__module__.startswith("torch.nn.")}
