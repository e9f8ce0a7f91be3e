"""Scaling the query and key weights of heads, in all layers of a plan or in none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..names import display_name
from . import layout
from .intervention import Change
from .projections import Projections


@dataclass(frozen=True)
class LayerScaling:
    """Factors for one layer's weights: query (H,), key (H,), or None to leave the keys alone."""

    layer: str
    query: Tensor
    key: Tensor | None

    def apply(self, model: nn.Module) -> None:
        """Find the layer's weights and multiply them."""
        _multiply(layout.find(model, self.layer, len(self.query)), self.query, self.key)

    def inverse(self) -> LayerScaling:
        """The scaling that takes this one back."""
        return LayerScaling(self.layer, 1 / self.query, None if self.key is None else 1 / self.key)


def scale_layers(model: nn.Module, plan: Sequence[LayerScaling]) -> Change:
    """Scale every layer of the plan. All of them have to be found before: no layer may be refused half-way."""
    plan = [scaling for scaling in plan if (scaling.query != 1).any()]

    def run(scalings: Sequence[LayerScaling]) -> None:
        for scaling in scalings:
            scaling.apply(model)

    run(plan)
    texts = [f"{display_name(s.layer)} heads {torch.nonzero(s.query != 1).flatten().tolist()}" for s in plan]
    text = f"scaled the weights of {', '.join(texts)}" if texts else "nothing to scale"
    return Change(text, lambda: run([scaling.inverse() for scaling in plan]))


@torch.no_grad()
def _multiply(projections: Projections, query: Tensor, key: Tensor | None) -> None:
    """Multiply each head's query weights by `query` (H,) and its key weights by `key` (H_kv,), in place."""
    for tensors, factors in ((projections.query, query), (projections.key, key)):
        if factors is None:
            continue
        for tensor in tensors:
            # In at least fp32: a bf16 factor would be off by half a percent.
            wide = torch.promote_types(tensor.dtype, torch.float32)
            tensor.mul_(factors.to(tensor.device, wide).view(-1, *(1,) * (tensor.dim() - 1)))
    if projections.shards is not None:
        projections.shards.multiply()
