"""Whether several processes hold the same keys, as the layout of a layer's weights tells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from . import orders
from .shards import Spread


@dataclass(frozen=True)
class KeyWeights:
    """What the weights of a layer, whose heads tensor parallelism splits, tell of its keys.

    whole: whether a weight that is known to make the keys stays whole; None if no name tells which one makes them.
    rows: of each weight of the layer that stays whole, its rows.
    """

    whole: bool | None = False
    rows: frozenset[int] = frozenset()

    @staticmethod
    def of(modules: Mapping[str, nn.Module], layer: str, spread: Spread) -> KeyWeights:
        """Those of a module of a model, by its name in `modules`, whose weights lie as `spread` says.

        Call this between forwards, as `Spread.of`.
        """
        if spread.part.count == 1:
            return KeyWeights()
        for name in (layer, layer.rpartition(".")[0]):
            found = orders.key_weights(modules[name]) if name in modules else []
            if found:
                return KeyWeights(not all(map(spread.splits, found)))
        weights = [p for p in modules[layer].parameters() if p.dim() > 1]
        return KeyWeights(None, frozenset(len(p) for p in weights if not spread.splits(p)))

    def shared(self, heads: int, head_dim: int) -> bool:
        """Whether several processes hold the same keys. heads, head_dim: of this process's keys.

        Without a known name, a weight that stays whole makes them if it has their rows, or those of keys and values.
        """
        if self.whole is not None:
            return self.whole
        return bool(self.rows & {heads * head_dim, 2 * heads * head_dim})
