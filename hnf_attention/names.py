"""Names of layers, as reports show them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .compat import dynamo, fsdp_wrapped


def display_name(layer: str) -> str:
    """A module's name in its model. The model itself has an empty name, which would leave a gap in a sentence."""
    return layer or "(the model itself)"


def call_name(layer: str, call: int) -> str:
    """The name of one call of a layer that is called several times in a forward; `call` counts from 0."""
    return f"{layer}#{call}"


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As `nn.Module.named_modules`, without the modules that torch.compile and data parallelism put around others."""
    plain: dict[str, str] = {}  # names as PyTorch gives them, to names without wrappers
    wraps: dict[str, str] = {}  # names of wrappers, to the name of the child that each one wraps
    for name, module in model.named_modules():
        parent, _, child = name.rpartition(".")
        if name and wraps.get(parent) == child:
            plain[name] = plain[parent]
        else:
            plain[name] = f"{plain[parent]}.{child}" if name and plain[parent] else child
        wrapped = wrapped_child(module)
        if wrapped is None:
            yield plain[name], module
        else:
            wraps[name] = wrapped


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of data parallelism and torch.compile."""
    while (wrapped := wrapped_child(model)) is not None:
        model = model.get_submodule(wrapped)
    return model


def wrapped_child(module: nn.Module) -> str | None:
    """The name of the child that this module is put around, None for a module of the model's own."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return "module"
    if dynamo.is_wrapper(module):
        return dynamo.WRAPPED
    return fsdp_wrapped(module)
