"""Names of layers, as reports show them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .compat import dynamo


def display_name(layer: str) -> str:
    """A module's name in its model. The model itself has an empty name, which would leave a gap in a sentence."""
    return layer or "(the model itself)"


def call_name(layer: str, call: int) -> str:
    """The name of one call of a layer that is called several times in a forward; `call` counts from 0."""
    return f"{layer}#{call}"


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As `nn.Module.named_modules`, without the modules that torch.compile puts around others."""
    for name, module in model.named_modules():
        if not dynamo.is_wrapper(module):
            yield dynamo.without_wrappers(name), module
