"""Catches the calls of the functions that the user registered."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from .. import registry
from ..patches import Patch, hidden, of_class, original_of
from .functions import interceptor


def install(modules: Collection[nn.Module]) -> list[Patch]:
    """Replace the registered functions, wherever they are held, until the patches are released."""
    patches: list[Patch] = []
    replacements: dict[Any, Any] = {}
    for one in registry.registered():
        # Models share a replacement, so it does not hold the description of one of them.
        describe = functools.partial(registry.call_of, one.path)
        replacement = functools.partial(interceptor, one.path, describe)
        place, name = registry.find(one.path)
        original = original_of(getattr(place, name))
        if isinstance(place, type):
            static = isinstance(inspect.getattr_static(place, name), staticmethod)
            if static:
                patches.append(Patch.acquire(*of_class(place, name, static), replacement))
            else:  # the class may have it from its base
                patches += Patch.everywhere(place, name, replacement, ())
        replacements[original] = replacement
    return patches + Patch.of_functions(replacements, modules)


def unreachable(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Why modules that hold a registered function out of reach are not measured, by their names."""
    places = [registry.find(one.path) for one in registry.registered()]
    return hidden(modules, [original_of(getattr(place, name)) for place, name in places])
