"""Repeated launches at a third of the host's time: the compiled kernel is kept and called directly."""

from collections.abc import Hashable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch

# The kernels were tuned and tested with fused multiply-adds. This is Triton's default; a user can change the default.
FUSED = {"enable_fp_fusion": True}
# Training sees few shapes. Where it sees many, the table starts anew now and then.
_LIMIT = 4096
_INT32 = 1 << 31
_NOTHING: Mapping[str, int] = MappingProxyType({})
_compiled: dict[Hashable, Any] = {}


def classes(arguments: Iterable[Any], found: list[Hashable]) -> None:
    """Append the class of every argument to `found`: what Triton specialises a compiled kernel on.

    For an integer: whether it is 1, whether 16 divides it, and its width. For a tensor: its dtype, and whether 16
    divides its address. For a descriptor: its dtype (its block follows from the kernel's plan). For a tuple: the
    classes of what is in it. Floating numbers are all of one class.
    """
    for argument in arguments:
        kind = type(argument)
        if kind is int:
            if argument == 1:
                found.append(1)
            else:
                divisible = 2 if argument & 15 else 16
                found.append(divisible if -_INT32 <= argument < _INT32 else -divisible)
        elif argument is None or kind is float:
            found.append(kind)
        elif isinstance(argument, torch.Tensor):
            found.append((argument.dtype, "unaligned") if argument.data_ptr() & 15 else argument.dtype)
        elif isinstance(argument, tuple):
            classes(argument, found)
        else:
            found.append(argument.base.dtype)


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    plan: Hashable,
    device: torch.device,
    arguments: Mapping[str, Any],
    numbers: Mapping[str, int] = _NOTHING,
    **options: int | None,
) -> Any:
    """`kernel[grid](**arguments, **numbers, plan, **options)`; returns the compiled kernel, None in the interpreter.

    Triton finds out anew at each launch what it has compiled. Here the compiled kernel is looked up by the `classes`
    of the arguments, so a new length of the same class is no new kernel.

    plan: the kernel's last parameter, a constant. device: the current one. numbers: integers that the kernel is not
    specialised on (its `do_not_specialize`). Arguments and numbers stand in the order of the kernel's parameters.
    options: Triton's own, such as num_warps; None for one that is not given (AMD's compiler has no maxnreg).
    """
    key: list[Hashable] = [kernel.fn, plan, device, *options.values()]
    classes(arguments.values(), key)
    for number in numbers.values():
        key.append(-_INT32 <= number < _INT32)
    place = tuple(key)
    compiled = _compiled.get(place)
    if compiled is not None:
        compiled[grid](*arguments.values(), *numbers.values(), plan)
        return compiled
    code = kernel.fn.__code__
    names = code.co_varnames[: code.co_argcount]
    if names[:-1] != (*arguments, *numbers):
        raise TypeError(f"expected arguments {names[:-1]}, got {(*arguments, *numbers)}")
    given = {name: option for name, option in options.items() if option is not None}
    compiled = kernel[grid](*arguments.values(), *numbers.values(), plan, **given, **FUSED)
    if compiled is not None:
        if len(_compiled) >= _LIMIT:
            _compiled.clear()
        _compiled[place] = compiled
    return compiled
