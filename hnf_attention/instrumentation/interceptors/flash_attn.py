"""Catches the functions of FlashAttention 2, 3 and 4, and of its builds on the `kernels` hub.

They are found under their names in the package's modules, and where transformers keeps those that it loaded. Then every
place is replaced that holds one of them: every file that imported it, and attributes of the model's modules.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from ... import compat
from ..flash_call import describer, describes
from ..patches import Patch, hidden, original_of
from .functions import interceptor

_MODULES = (
    "flash_attn",
    "flash_attn.flash_attn_interface",
    "flash_attn_interface",
    "flash_attn_3.flash_attn_interface",
    "flash_attn.cute",
    "flash_attn.cute.interface",
)
_NAMES = (
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_with_kvcache",
)


def install(modules: Collection[nn.Module]) -> list[Patch]:
    """Replace the functions, wherever they are held, until the patches are released."""
    replacements = {
        function: functools.partial(interceptor, name, describer(name, function))
        for name, function in _functions().items()
    }
    return Patch.of_functions(replacements, modules)


def unreachable(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Why modules that hold such a function out of reach are not measured, by their names."""
    return hidden(modules, list(_functions().values()))


def _functions() -> dict[str, Callable[..., Any]]:
    """The functions that are loaded now, by the names that the coverage gives them."""
    found: dict[str, Any] = {}
    for place in _MODULES:
        library = sys.modules.get(place)
        held = {} if library is None else vars(library)
        found |= {f"{place}.{name}": original_of(held[name]) for name in _NAMES if name in held}
    for held in map(original_of, compat.loaded_flash_functions()):
        name = getattr(held, "__name__", type(held).__name__)  # a partial has none
        found[f"{getattr(held, '__module__', '')}.{name}"] = held
    one_name = {id(function): name for name, function in reversed(found.items())}
    return {name: found[name] for name in reversed(one_name.values()) if describes(found[name])}
