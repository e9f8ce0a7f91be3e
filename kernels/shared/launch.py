"""Repeated launches at a third of the host's time: the compiled kernel is kept, and called as it is."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch

_NUMBERS = {int, float, type(None)}
# Exponents are one multiply-add of the score: what the kernels were tuned and tested with, Triton's default as long
# as nobody changes it.
FUSED = {"enable_fp_fusion": True}
# Shapes vary in few ways in training; where they do not (every length its own), start anew now and then.
_LIMIT = 4096
_compiled: dict[Hashable, Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    key: tuple[Hashable, ...],
    arguments: Sequence[Any],
    constants: dict[str, Any],
    **options: int,
) -> None:
    """`kernel[grid](*arguments, **constants, **options)`, but looking up by `key` what Triton compiled for it.

    Triton works that out anew at each launch, from every argument. key: the device (which is current),
    and whatever the dtypes and integers among the arguments, and `options`, follow from; floating
    numbers and addresses are no part of it: where a tensor does not start at 16 bytes, Triton decides.
    constants: in the kernel's own order, after all arguments.
    """
    addresses = 0
    for argument in arguments:
        if type(argument) not in _NUMBERS and isinstance(argument, torch.Tensor):
            addresses |= argument.data_ptr()
    key = (kernel.fn, *key, *constants.values())
    compiled = None if addresses % 16 else _compiled.get(key)
    if compiled is not None:
        compiled[grid](*arguments, *constants.values())
        return
    compiled = kernel[grid](*arguments, **constants, **options, **FUSED)
    if compiled is None or addresses % 16:  # the interpreter compiles nothing
        return
    if len(_compiled) >= _LIMIT:
        _compiled.clear()
    _compiled[key] = compiled
