"""Which attention modules are measured, which are not, and why."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ..compat import attention_implementation
from ..names import display_name

_ATTENTION = re.compile("attention|attn", re.IGNORECASE)
_MEASURED_IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention", "hnf_attention", None)


@dataclass(frozen=True, repr=False)
class Coverage:
    """Layer names: `measured` says how each one is measured, `not_measured` why it is not.

    A layer of which only some calls can be measured is in both. `str()` is a report with one line per layer.
    """

    measured: Mapping[str, str]
    not_measured: Mapping[str, str]

    def __repr__(self) -> str:
        return f"Coverage({len(self.measured)} measured, {len(self.not_measured)} not measured)"

    def __str__(self) -> str:
        width = max((len(display_name(name)) for name in (*self.measured, *self.not_measured)), default=0)
        lines = []
        parts = (("attention measured", self.measured), ("attention NOT measured", self.not_measured))
        for title, layers in parts:
            if layers:
                lines.append(f"{title} ({len(layers)}):")
                lines += [f"  {display_name(name):<{width}}  {text}" for name, text in layers.items()]
        if not self.measured:
            lines.insert(
                0,
                "nothing measured yet: no forward has run, or none of its attention was reached "
                "(a softmax is attention if its scores are a product of queries and keys and its result meets values)",
            )
        return "\n".join(lines)


def is_attention(module: nn.Module) -> bool:
    """Whether the class name says attention, and not that it is the projection after it."""
    name = type(module).__name__
    return _ATTENTION.search(name) is not None and not name.endswith("AttentionOutput")


def unreached(attention: Mapping[str, nn.Module], measured: Mapping[str, str]) -> dict[str, str]:
    """Attention modules of which nothing was measured, by name, with what is known about the reason.

    A module is reached if it, a module inside it, or an attention module around it was measured. A measured module
    that is no attention module counts for itself only: a scaled_dot_product_attention in a model's own forward says
    nothing about the layers inside the model.
    """

    def reached(name: str) -> bool:
        inside = f"{name}." if name else ""
        return name in measured or any(
            layer.startswith(inside) or (layer in attention and (not layer or name.startswith(f"{layer}.")))
            for layer in measured
        )

    return {name: _reason(module) for name, module in attention.items() if not reached(name)}


def _reason(module: nn.Module) -> str:
    implementation = attention_implementation(module)
    if implementation not in _MEASURED_IMPLEMENTATIONS:
        load = 'attn_implementation="sdpa", "eager" or "flex_attention"'
        if "flash" in implementation:
            return (
                f"attn_implementation={implementation!r}: no function of FlashAttention was reached; load the model "
                f"before it is instrumented, or with {load}"
            )
        return f"attn_implementation={implementation!r} is not measured; load the model with {load}"
    return (
        "no call reached scaled_dot_product_attention, flex_attention, the Hugging Face attention interface, a library "
        "that is known, a registered function, or a softmax between two products (a compiled graph hides "
        "tensor.softmax(); torch.softmax() is seen); a library has to be imported before the model is instrumented"
    )
