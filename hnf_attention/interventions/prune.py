"""Switching heads off, with the loss that it costs measured first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..names import display_name
from .action import Action, Preview, Reading, Verdict
from .on_calls import OnCalls, layers_of


class _Pruned:
    """The change of one module's call."""

    name, sdpa_only, optional, dropout = "pruned heads", True, False, True

    def __init__(self, heads: list[int]):
        self._heads = heads

    def run(
        self,
        module: nn.Module,
        attend: Callable[..., Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *rest: Any,
        **named: Any,
    ) -> Tensor:
        """As `Change.run`: these heads give zeros, and learn nothing."""
        out = attend(query, key, value, *rest, **named)
        if max(self._heads) >= out.shape[1]:
            raise RuntimeError(f"expected heads below {out.shape[1]} to prune, got {self._heads}")
        keep = torch.ones(out.shape[1], 1, 1, dtype=out.dtype, device=out.device)
        keep[self._heads] = 0
        return torch.where(keep > 0, out, torch.zeros((), dtype=out.dtype, device=out.device))


class PruneHeads(OnCalls):
    """Sets the output of heads to 0. Reverting brings them back.

    intervention: 'layers': {layer: [numbers of heads]}. Raises ValueError for wrong items.
    """

    name = "prune_heads"

    def __init__(self, model: nn.Module, intervention: Mapping[str, Any]):
        layers = intervention.get("layers")
        if not isinstance(layers, Mapping):
            raise ValueError(f"expected 'layers' to map layer names to numbers of heads, got {layers!r}")
        layers_of(model, {"layers": list(layers)})
        for layer, heads in layers.items():
            whole = [isinstance(head, int) and not isinstance(head, bool) and head >= 0 for head in heads]
            if not whole or not all(whole):
                raise ValueError(f"expected numbers of heads of layer {layer!r}, got {heads!r}")
        self._layers = {layer: list(heads) for layer, heads in layers.items()}
        super().__init__(model, {layer: _Pruned(heads) for layer, heads in self._layers.items()})

    def preview(self) -> Preview:
        """As `Action.preview`; `loss_change` measures what it costs."""
        said = [f"{display_name(layer)} heads {heads}" for layer, heads in self._layers.items()]
        return Preview(f"switches off {', '.join(said)}", {"layers": dict(self._layers)})

    def verify(self, reading: Reading) -> Verdict:
        """A reading shows the scores of a head, not that its output is left out."""
        return Verdict(None, self.preview().text)


def loss_change(action: Action, loss: Callable[[], Tensor | float]) -> float:
    """By how much an action changes a loss: it is applied for one call of `loss`, without grad, and reverted.

    loss: computes the loss of the same batch at each call, for example of a batch that is held out.
    """
    with torch.no_grad():
        before = float(loss())
        action.apply()
        try:
            return float(loss()) - before
        finally:
            action.revert()
