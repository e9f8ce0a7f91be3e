"""Scaling the query and key weights of heads, in all layers of a plan or in none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..names import display_name
from . import layout
from .intervention import Change


@dataclass(frozen=True)
class LayerScaling:
    """Factors for one layer's weights: query (H,), key (H,), or None to leave the keys alone."""

    layer: str
    query: Tensor
    key: Tensor | None

    def apply(self, model: nn.Module) -> None:
        """Find the layer's weights and multiply them."""
        layout.find(model, self.layer, len(self.query)).multiply(self.query, self.key)

    def inverse(self) -> LayerScaling:
        """The scaling that takes this one back."""
        return LayerScaling(self.layer, 1 / self.query, None if self.key is None else 1 / self.key)


def scale_layers(model: nn.Module, plan: Sequence[LayerScaling]) -> Change:
    """Scale every layer of the plan, which was made for this model. If one fails, those before it are scaled back."""
    plan = [scaling for scaling in plan if (scaling.query != 1).any()]

    def run(scalings: Sequence[LayerScaling]) -> None:
        for number, scaling in enumerate(scalings):
            try:
                scaling.apply(model)
            except Exception:
                for done in scalings[:number]:
                    done.inverse().apply(model)
                raise

    run(plan)
    texts = [f"{display_name(s.layer)} heads {torch.nonzero(s.query != 1).flatten().tolist()}" for s in plan]
    text = f"scaled the weights of {', '.join(texts)}" if texts else "nothing to scale"
    return Change(text, lambda: run([scaling.inverse() for scaling in plan]))


def refuse_masters(layer: str, parameters: Iterable[Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError if the optimizer seems to keep fp32 copies of these 16-bit parameters of a layer.

    Its next step would write the copies over any change of the weights.
    """
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not any(parameter.dtype == torch.float32 for parameter in held):
        return
    updated = {id(parameter) for parameter in held}
    for parameter in parameters:
        if parameter.element_size() == 2 and id(parameter) not in updated:
            raise ValueError(
                f"expected an optimizer that updates the {parameter.dtype} weights of layer {layer!r} "
                "themselves, got one with other tensors in fp32: its master weights would undo the change "
                "(hand over the model that holds them)"
            )
