"""How a layer is named to people."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

_COMPILED = "_orig_mod"  # where torch.compile's wrapper keeps the module that it wraps


def display_name(layer: str) -> str:
    """A module's name in its model; the model itself has an empty one, which would leave a gap in a sentence."""
    return layer or "(the model itself)"


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As of `nn.Module.named_modules`, without the wrappers that torch.compile puts around modules."""
    for name, module in model.named_modules():
        if _COMPILED not in module._modules:
            yield ".".join(part for part in name.split(".") if part != _COMPILED), module
