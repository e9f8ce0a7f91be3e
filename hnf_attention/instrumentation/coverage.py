"""Which attention modules are measured, which are not, and why."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ..names import display_name

_ATTENTION = re.compile("attention|attn", re.IGNORECASE)
_MEASURED_IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention", None)


@dataclass(frozen=True)
class Coverage:
    """Layer names: `measured` says how each one is measured, `not_measured` why it is not.

    A layer is in both where only some of its calls can be measured.
    """

    measured: Mapping[str, str]
    not_measured: Mapping[str, str]

    def __str__(self) -> str:
        width = max((len(display_name(name)) for name in (*self.measured, *self.not_measured)), default=0)
        lines = []
        parts = (("attention measured", self.measured), ("attention NOT measured", self.not_measured))
        for title, layers in parts:
            if layers:
                lines.append(f"{title} ({len(layers)}):")
                lines += [f"  {display_name(name):<{width}}  {text}" for name, text in layers.items()]
        if not self.measured:
            lines.insert(0, "nothing measured yet: no forward has run, or none of its attention was reached")
        return "\n".join(lines)


def is_attention(module: nn.Module) -> bool:
    """Whether the class name says attention, and not that it is the projection after it."""
    name = type(module).__name__
    return _ATTENTION.search(name) is not None and not name.endswith("AttentionOutput")


def unreached(attention: Mapping[str, nn.Module], measured: Mapping[str, str]) -> dict[str, str]:
    """Attention modules of which nothing was measured, with what is known about the reason.

    A module counts as reached when it, a module inside it, or an attention module around it was
    measured. (A container that is no attention module vouches for itself only: otherwise one
    scaled_dot_product_attention in a model's own forward would hide every layer below it.)
    """

    def reached(name: str) -> bool:
        inside = f"{name}." if name else ""
        return name in measured or any(
            layer.startswith(inside) or (layer in attention and (not layer or name.startswith(f"{layer}.")))
            for layer in measured
        )

    return {name: _reason(module) for name, module in attention.items() if not reached(name)}


def _reason(module: nn.Module) -> str:
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if implementation not in _MEASURED_IMPLEMENTATIONS:
        return (
            f"attn_implementation={implementation!r} is not measured; load the model with "
            'attn_implementation="sdpa", "eager" or "flex_attention"'
        )
    return (
        "no call reached scaled_dot_product_attention, flex_attention or the Hugging Face attention interface "
        "or a softmax over scores (a compiled graph hides tensor.softmax(); torch.softmax() is seen)"
    )
