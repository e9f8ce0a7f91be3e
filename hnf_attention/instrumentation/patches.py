"""Replacing a function in place and putting it back: exact, shared, and never over somebody else's replacement."""

from __future__ import annotations

import functools
import inspect
import operator
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

from torch import nn

from .. import compat
from ..compat import dynamo
from ..errors import report

_Place = tuple[Callable[[], Callable[..., Any]], Callable[[Any], None]]
#: What makes our function from the original, by the original.
Replacements = Mapping[Callable[..., Any], Callable[[Any], Callable[..., Any]]]

_lock = threading.RLock()  # re-entrant: a garbage collection inside it may release a patch
_MARK = "_hnf_attention_patch"
#: Patches without users that a garbage collection released while Dynamo traced. The graph will be guarded by the
#: function that it was traced with, so that one stays until the next patch comes or goes.
_late: list[Patch] = []


class _Thread(threading.local):
    """Lists that take in each patch that this thread acquires now, the innermost last."""

    def __init__(self) -> None:
        self.collecting: list[list[Patch]] = []


_thread = _Thread()


class Patch:
    """A function that stays replaced while at least one user holds it.

    A second user of the same place shares the first one's replacement. The last `release` puts the original back.
    If somebody else has replaced ours meanwhile, theirs stays; ours, which they may call, then leads to the original.

    read, write: get and set the function in its place. replacement: makes ours from the original.
    """

    def __init__(
        self,
        read: Callable[[], Callable[..., Any]],
        write: Callable[[Any], None],
        replacement: Callable[[Any], Callable[..., Any]],
    ):
        dynamo.fill_function_table()
        self._read, self._write = read, write
        self._users = 0
        self._original = read()
        self._ours = replacement(self._original)
        setattr(self._ours, _MARK, self)
        compat.script_as(self._ours, self._original)
        write(self._ours)

    @staticmethod
    def acquire(
        read: Callable[[], Callable[..., Any]],
        write: Callable[[Any], None],
        replacement: Callable[[Any], Callable[..., Any]],
    ) -> Patch:
        """The patch of this place: the one that is there, or a new one."""
        with _lock:
            _put_late_ones_back()
            current = read()
            patch: Patch | None = getattr(current, _MARK, None)
            # The mark alone proves nothing: functools.wraps copies it to a wrapper around ours.
            if patch is None or patch._ours is not current:
                patch = Patch(read, write, replacement)
            patch._users += 1
            for acquired in _thread.collecting[-1:]:
                acquired.append(patch)
            return patch

    @staticmethod
    def everywhere(
        place: Any,
        name: str,
        replacement: Callable[[Any], Callable[..., Any]],
        modules: Iterable[nn.Module],
    ) -> list[Patch]:
        """Patch the attribute `name` of `place`, and every global that the files of these modules imported it as."""
        with _lock:
            _put_late_ones_back()
        inherited = None if name in vars(place) else getattr(place, name)
        write = functools.partial(_write, place, name, inherited)
        first = Patch.acquire(functools.partial(getattr, place, name), write, replacement)
        patches = [first]
        for space in namespaces(modules):
            if space is vars(place):
                continue
            for imported, value in list(space.items()):
                patch = getattr(value, _MARK, None) if isinstance(value, FunctionType) else None
                if value is first._original or (patch is not None and patch._original is first._original):
                    patches.append(Patch.acquire(*of_item(space, imported), replacement))
        return patches

    @staticmethod
    def of_functions(replacements: Replacements, modules: Collection[nn.Module]) -> list[Patch]:
        """Patch every place that holds one of these functions, or what a compiler made of one.

        Places are the globals of every imported file, and the attributes of these modules and of their classes.
        """
        with _lock:
            _put_late_ones_back()
        return [
            Patch.acquire(*place, replacements[function])
            for function, place in _places(replacements, modules)
        ]

    def release(self) -> None:
        """Give up one use. The last one restores the original, but not while Dynamo traces: see `_late`."""
        with _lock:
            self._users -= 1
            _late.append(self)
            if compat.lowered_graph() is None:
                _put_late_ones_back()

    def _put_back(self) -> None:
        if self._users == 0 and self._read() is self._ours:
            self._write(self._original)
            compat.script_no_longer(self._ours)
            dynamo.renew_function_table(self._ours)


def _put_late_ones_back() -> None:
    while _late:
        _late.pop()._put_back()


@contextmanager
def all_or_none() -> Iterator[None]:
    """Release each patch that this thread acquires inside if an error comes out of it."""
    acquired: list[Patch] = []
    _thread.collecting.append(acquired)
    try:
        yield
    except BaseException:
        release_all(acquired)
        raise
    finally:
        _thread.collecting.pop()
        for outer in _thread.collecting[-1:]:
            outer += acquired


def release_all(patches: list[Patch]) -> None:
    """Release these patches, the last one first. One that cannot be put back keeps no other one in place."""
    while patches:
        try:
            patches.pop().release()
        except Exception as error:
            report("a replaced function could not be put back", error)


def original_of(function: Any) -> Any:
    """The function that this one stands for: what our replacement replaced, without the wrapper of a compiler.

    A wrapper of somebody else stands for itself: it may take other arguments.
    """
    while (
        type(function) is FunctionType
    ):  # `isinstance` would ask lazy objects for their class, which may warn
        patch: Patch | None = getattr(function, _MARK, None)
        if patch is not None and patch._ours is function:
            function = patch._original
        elif dynamo.is_compiled(function):
            function = inspect.unwrap(function)
        else:
            break
    return function


def _may_hold(space: dict[str, Any], known: Mapping[int, Any]) -> bool:
    """Whether one of these functions, or something that may stand for one, is in a namespace.

    All files together hold a hundred thousand values, so this has to be quick.
    """
    values = list(space.values())
    if not known.keys().isdisjoint(map(id, values)):
        return True
    functions = [value for value in values if type(value) is FunctionType]
    return any(hasattr(function, _MARK) or dynamo.is_compiled(function) for function in functions)


def _places(
    functions: Collection[Callable[..., Any]], modules: Collection[nn.Module]
) -> Iterator[tuple[Callable[..., Any], _Place]]:
    """Each place that holds one of these functions: which, and how to read and write it."""
    if not functions:
        return
    known = {id(function): function for function in functions}

    def found(value: Any) -> Callable[..., Any] | None:
        return known.get(id(original_of(value)))

    seen: set[int] = set()  # a file may be imported by several names
    for file in list(sys.modules.values()):
        if issubclass(type(file), ModuleType) and id(vars(file)) not in seen:
            seen.add(id(vars(file)))
            for name, value in list(vars(file).items()) if _may_hold(vars(file), known) else ():
                if (function := found(value)) is not None:
                    yield function, of_item(vars(file), name)
    for cls in classes(modules):
        for name, value in list(vars(cls).items()):
            static = type(value) is staticmethod
            if (function := found(value.__func__ if static else value)) is not None:
                yield function, of_class(cls, name, static)
    for module in modules:
        for name, value in list(vars(module).items()):
            if (function := found(value)) is not None:
                yield function, of_attribute(module, name)


def hidden(modules: Mapping[str, nn.Module], functions: Collection[Callable[..., Any]]) -> dict[str, str]:
    """Why modules that hold one of these functions inside a `functools.partial` are not measured, by their names."""
    known = {id(function) for function in functions}
    return {
        layer: f"its attribute {name!r} is a functools.partial of {original_of(value.func).__name__}, "
        "which is called past every replacement"
        for layer, module in modules.items()
        for name, value in vars(module).items()
        if isinstance(value, functools.partial) and id(original_of(value.func)) in known
    }


def of_class(cls: type, name: str, static: bool) -> _Place:
    """How a patch reads and writes a function that a class holds. static: as a staticmethod."""

    def write(function: Callable[..., Any]) -> None:
        setattr(cls, name, staticmethod(function) if static else function)

    return functools.partial(getattr, cls, name), write


def of_attribute(module: nn.Module, name: str) -> _Place:
    """How a patch reads and writes a function that a module holds. The module is not kept alive."""
    reference = weakref.ref(module)

    def write(function: Callable[..., Any]) -> None:
        held = reference()
        if held is not None:
            vars(held)[name] = function

    def read() -> Any:
        held = reference()
        return None if held is None else vars(held).get(name)

    return read, write


def of_item(
    space: dict[str, Any], name: str
) -> tuple[Callable[[], Callable[..., Any]], Callable[[Any], None]]:
    """How a patch reads and writes one item of a namespace."""
    # Whoever deletes the item meanwhile has nothing to put back.
    return functools.partial(space.get, name), functools.partial(operator.setitem, space, name)  # type: ignore[return-value]


def _write(place: Any, name: str, inherited: Any, function: Callable[..., Any]) -> None:
    if function is inherited:  # a class has it from its base
        delattr(place, name)
    else:
        setattr(place, name, function)


def methods(cls: type) -> Iterator[FunctionType]:
    """The methods of a module's class and of its bases below nn.Module, without their wrappers."""
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
    """The classes of these modules and their bases, without those of torch.nn."""
    found = {
        base for cls in {type(x) for x in modules} for base in cls.__mro__ if issubclass(base, nn.Module)
    }
    return {cls for cls in found if not cls.__module__.startswith("torch.nn.")}
