"""Triton's interpreter: what each launch is told, and the costs of it that can be saved."""

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch


class Unchanged:
    """A patch of `triton.language` that changed nothing."""

    def restore(self) -> None:
        pass


def patch_language_once() -> None:
    """The interpreter patches `triton.language` at every call of a device function, which takes half of its time.

    One patch lasts until the launch ends. Without the private function of Triton nothing is changed.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang", None)
    if patch is None:
        return

    def patch_once(fn: Callable) -> Any:
        modules = [module for module in fn.__globals__.values() if module is tl or module is tl.core]
        # A patched function is a plain one.
        if modules and not any(tl.core.is_builtin(module.load) for module in modules):
            return Unchanged()
        return patch(fn)

    interpreter._patch_lang = patch_once


def skip_overflow_checks() -> None:
    """The interpreter computes each sum and product of 32-bit integers again in 64 bits: a third of its time.

    The slow suite keeps the checks.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)


def record_launches(record: Callable[[str, dict[str, Any]], None]) -> None:
    """Call `record` with each kernel's name and its arguments by name, before the interpreter runs it."""
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def recorded(kernel: Any, *arguments: Any, **keywords: Any) -> Any:
        named = dict(zip(kernel.arg_names, arguments))
        named |= {name: value for name, value in keywords.items() if name in kernel.arg_names}
        record(kernel.fn.__name__, named)
        return run(kernel, *arguments, **keywords)

    InterpretedFunction.run = recorded


def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The values in an argument by name, those in tuples and plain dataclasses too."""
    if type(value).__name__ == "constexpr":
        value = value.value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        for field, inner in zip(value._fields, value):
            yield from leaves(field, inner)
    elif isinstance(value, tuple):
        for inner in value:
            yield from leaves(name, inner)
    elif is_dataclass(value) and not hasattr(value, "base"):
        for field in fields(value):
            yield from leaves(field.name, getattr(value, field.name))
    else:
        yield name, value


def dtype(value: Any) -> torch.dtype | None:
    """Of a tensor or of a descriptor of one."""
    return getattr(getattr(value, "base", value), "dtype", None)
