"""A learning rate of their own for query and key weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..names import display_name
from . import layout
from .action import Preview
from .beside_steps import BesideSteps
from .intervention import positive
from .projections import Projections


class QKRates(BesideSteps):
    """Learns query and key weights at a rate of their own: `factor` times that of the other weights.

    Scores are products of both, and change with the rate of both (arXiv 2511.21377). Each step of the optimizer is
    shortened in these rows, whatever the optimizer, its groups and the layout: fused projections keep the rate of their
    values. Raises ValueError for wrong items, and for layers whose weights are not proved.
    """

    name = "qk_rate"

    def __init__(
        self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], intervention: Mapping[str, Any]
    ):
        super().__init__(optimizers)
        layers = intervention.get("layers")
        if not isinstance(layers, Mapping) or not layers:
            raise ValueError(f"expected 'layers' to map layer names to their number of heads, got {layers!r}")
        self._factor = positive(intervention, "factor")
        self._found: dict[str, Projections] = {}
        for layer, heads in layers.items():
            if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
                raise ValueError(f"expected the number of heads of layer {layer!r}, got {heads!r}")
            self._found[layer] = layout.find(model, layer, heads)
            if not self._found[layer].whole:
                raise ValueError(
                    f"expected whole weights in layer {layer!r}, got some in parts (FSDP2, DTensors)"
                )
        self._old: list[Tensor] = []

    def preview(self) -> Preview:
        """As `Action.preview`."""
        names = ", ".join(map(display_name, self._found))
        text = f"query and key weights of {names} learn at {self._factor:g} of the rate"
        return Preview(text, {"layers": list(self._found), "factor": self._factor})

    def before(self, optimizer: torch.optim.Optimizer) -> None:
        """Remember the rows."""
        with torch.no_grad():
            self._old = [rows.clone() for rows in self._rows(optimizer)]

    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """Shorten what the step did to them."""
        with torch.no_grad():
            for rows, old in zip(self._rows(optimizer), self._old):
                rows.copy_(old.lerp(rows, self._factor))
        self._old = []

    def _rows(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        mine = {p.data_ptr() for group in optimizer.param_groups for p in group["params"]}
        found = []
        for one in self._found.values():
            if any(p.data_ptr() in mine for p in one.parameters):
                if one.query[0].untyped_storage().data_ptr() not in {
                    p.untyped_storage().data_ptr() for p in one.parameters
                }:
                    raise RuntimeError(
                        "expected query and key weights where they were when qk_rate began, got a model that was "
                        "moved: revert it and apply it again"
                    )
                found += [*one.query, *one.key, *one.rest]
        return found
