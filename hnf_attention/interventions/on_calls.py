"""Actions that change what a layer's attention call computes, while its weights stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..compat import dynamo
from ..instrumentation.treated import Change, Treated
from ..names import named_modules
from .action import Action


def layers_of(model: nn.Module, intervention: Mapping[str, Any]) -> dict[str, nn.Module]:
    """The modules that the item 'layers' names: those that call scaled_dot_product_attention themselves.

    Raises ValueError for anything but a list of names of modules.
    """
    names, modules = intervention.get("layers"), dict(named_modules(model))
    if not isinstance(names, (list, tuple)) or not names or not all(name in modules for name in names):
        raise ValueError(f"expected 'layers' to be a list of names of modules of the model, got {names!r}")
    return {name: modules[name] for name in names}


class OnCalls(Action):
    """Puts a change on the attention calls of layers. Reverting takes it off; weights are never touched.

    The next forward raises RuntimeError if such a layer does not call scaled_dot_product_attention itself.
    """

    def __init__(self, model: nn.Module, changes: Mapping[str, Change]):
        super().__init__()
        modules = dict(named_modules(model))
        self._model = model
        self._changes = {name: (modules[name], change) for name, change in changes.items()}

    def _do(self, undo: list[Callable[[], Any]]) -> str:
        compiled = any(dynamo.is_wrapper(module) for module in self._model.modules())
        if compiled:
            undo.append(torch.compiler.reset)  # graphs of before know nothing of it
        for module, change in self._changes.values():
            Treated.add(module, change)
            undo.append(partial(Treated.remove, module, change))
        if compiled:
            torch.compiler.reset()
        return self.preview().text
