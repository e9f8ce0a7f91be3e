"""Private names of Hugging Face transformers. Nothing of it is imported here."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def attention_implementation(module: nn.Module) -> str | None:
    """The attention implementation ("sdpa", "eager", ...) that the module's config chooses.

    Missing: None. Coverage then lists the module with a general reason.
    """
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def collects_attention_weights() -> bool:
    """Whether the running model collects attention weights for its caller.

    Missing, as in transformers 4: True. Eager attention then always keeps its own output, with the weights.
    """
    capturing = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(capturing, "_active_collector", None)
    return collector is None or any("attentions" in kind for kind in collector.get() or ())


def loaded_flash_functions() -> list[Any]:
    """The functions of FlashAttention that transformers has loaded, from the package or from the `kernels` hub.

    Missing: none. Those of the package are then found in its own modules, those of the hub are listed as never reached.
    """
    module = sys.modules.get("transformers.modeling_flash_attention_utils")
    names = "_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn"
    held = [getattr(module, name, None) for name in names]
    return [function for function in held if function is not None]


def device_mesh(model: nn.Module) -> Any:
    """The device mesh over which transformers itself distributed the model, None for any other model.

    Missing: None. Statistics of its processes are then not put together unless `ranks` says how.
    """
    return getattr(model, "_device_mesh", None)


@torch.no_grad()
def initialise(model: nn.Module, fields: Mapping[str, Any]) -> None:
    """Give a Hugging Face model new random weights, as if its configuration had these fields.

    The weights of some classes depend on the number of layers.
    Missing, or without a use of these fields: the weights stay.
    """
    initialise_module, config = getattr(model, "_init_weights", None), getattr(model, "config", None)
    code = getattr(inspect.unwrap(initialise_module), "__code__", None) if initialise_module else None
    if (
        initialise_module is None
        or config is None
        or (code is not None and not set(fields) & set(code.co_names))
    ):
        return
    before = {name: getattr(config, name) for name in fields}
    try:
        for name, value in fields.items():
            setattr(config, name, value)
        model.apply(initialise_module)
    finally:
        for name, value in before.items():
            setattr(config, name, value)
