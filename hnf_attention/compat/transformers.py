"""Private names of Hugging Face transformers. Nothing of it is imported here."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


def attention_implementation(holder: Any) -> str | None:
    """The attention implementation ("sdpa", "eager", ...) that a config chooses, given it or a module that has it.

    Missing: None. Coverage then lists the module with a general reason.
    """
    return getattr(getattr(holder, "config", holder), "_attn_implementation", None)


def set_attention_implementation(config: Any, name: str | None) -> None:
    """Choose the attention implementation of this config alone, not of the configs inside it.

    Missing: the public setter, which chooses it for the configs inside it, too.
    """
    inner = "_attn_implementation_internal"
    setattr(config, inner if hasattr(config, inner) else "_attn_implementation", name)


def takes_boolean_masks(config: Any) -> bool:
    """Whether all attention of a model with this config takes boolean masks, or none where a causal flag says it all.

    Its classes say so: they support "sdpa", or any function of AttentionInterface. Missing, or a class whose file is
    elsewhere: False. The model's masks are then additive, which every attention takes.
    """
    name = type(config).__module__.replace(".configuration_", ".modeling_")
    kinds = [
        kind
        for kind in vars(sys.modules.get(name, object)).values()
        if isinstance(kind, type) and kind.__module__ == name and hasattr(kind, "_supports_sdpa")
    ]
    takes = (
        kind._supports_sdpa or getattr(kind, "_supports_attention_backend", False)  # type: ignore[attr-defined]
        for kind in kinds
    )
    return bool(kinds) and all(takes)


def causal_window(mask_function: Callable[..., Any]) -> int | None:
    """The window w of a mask function that shows each query the last w keys up to its own; None for any other function.

    Told by the functions of transformers that it is made of. Missing: None. A mask then carries the window.
    """
    masking = sys.modules.get("transformers.masking_utils")
    try:
        window, causal = inspect.getclosurevars(mask_function).nonlocals["mask_functions"]
        size = inspect.getclosurevars(window).nonlocals["sliding_window"]
    except (KeyError, TypeError, ValueError):
        return None
    ours = getattr(masking, "sliding_window_overlay", None), getattr(masking, "causal_mask_function", None)
    made = window.__module__ == getattr(masking, "__name__", None)
    named = ours[0] is not None and window.__qualname__.startswith(f"{ours[0].__name__}.<locals>.")
    return size if made and named and causal is ours[1] and type(size) is int else None


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


def splits_layer(forward: Any) -> bool:
    """Whether a forward is one that transformers puts around a layer's own, where its plan splits it over processes.

    It puts inputs and outputs into DTensors, and takes them out. Missing: False. QK-clip then refuses such layers.
    """
    return getattr(forward, "__module__", None) == "transformers.distributed.tensor_parallel"


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
