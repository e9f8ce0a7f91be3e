"""How each attention call of a forward saw NaN and inf: in which tensors, heads and rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..instrumentation import Instrumentation, Measurement, instrument
from ..instrumentation.coverage import is_attention
from ..instrumentation.measurement import beside_rows
from ..names import named_modules

#: In the order in which attention makes them.
TENSORS = ("query", "key", "value", "scores", "out")


@dataclass(frozen=True, slots=True)
class Seen:
    """One attention call.

    num_heads, num_key_heads, head_dim: its sizes; key heads and dimension are 0 where q and k are not known.
    heads: of each of TENSORS that is not finite, the query heads that hold it, with (batch, row) of the first.
    """

    layer: str
    num_heads: int
    num_key_heads: int
    head_dim: int
    heads: dict[str, tuple[int, ...]]
    rows: dict[str, tuple[int, int]]


class Calls:
    """The attention calls of the forwards inside of `with`.

    unseen: why the model's attention could not be watched; None if it could.
    """

    def __init__(self, model: nn.Module):
        self.seen: list[Seen] = []
        self.unseen: str | None = None
        self._named = [name for name, module in named_modules(model) if is_attention(module)]
        try:
            self._handle: Instrumentation | None = instrument(model, holder=self)
            self._handle.on_measure = self._measured
        except ValueError as error:
            self._handle, self.unseen = None, str(error)

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def restore(self) -> None:
        if self._handle is not None:
            self._handle.restore()

    def layer_of(self, module: str | None) -> str | None:
        """The attention layer that the module is, or is inside of; None if it is in none."""
        if module is None:
            return None
        measured = {plain(seen.layer) for seen in self.seen}
        found = max((x for x in measured if _inside(module, x)), key=len, default=None)
        if found is not None:
            return found
        named = [x for x in self._named if not any(_inside(layer, x) for layer in measured)]
        return max((x for x in named if _inside(module, x)), key=len, default=None)

    def first(self, layer: str) -> Seen | None:
        """The first call of the layer that saw something that is not finite; its first call if none did."""
        calls = [seen for seen in self.seen if plain(seen.layer) == layer]
        return next((seen for seen in calls if seen.heads), calls[0] if calls else None)

    @torch.no_grad()
    def _measured(self, measurement: Measurement) -> None:
        found = beside_rows(measurement).nonfinite
        lse = measurement.rows.lse
        flags = {
            "query": found.query,
            "key": found.key,
            "value": found.value,
            "scores": lse.isnan() | (lse == torch.inf),
            "out": found.out,
        }
        heads: dict[str, tuple[int, ...]] = {}
        rows: dict[str, tuple[int, int]] = {}
        for name, flag in flags.items():
            if isinstance(flag, Tensor) and flag.any():
                wide = flag.expand(-1, lse.shape[1], -1)
                heads[name] = tuple(wide.any(2).any(0).nonzero().flatten().tolist())
                first = wide.any(1).nonzero()[0].tolist()
                rows[name] = first[0], first[1]
        key = measurement.key
        known = measurement.query is not None
        self.seen.append(
            Seen(
                measurement.layer,
                lse.shape[1],
                0 if key is None else key.shape[1],
                measurement.head_dim if known else 0,
                heads,
                rows,
            )
        )


def _inside(module: str, layer: str) -> bool:
    """Whether a module is that layer, or a part of it. The model itself is a layer only for itself."""
    return module == layer or (layer != "" and module.startswith(f"{layer}."))


def plain(layer: str) -> str:
    """The layer's name without the number of its call."""
    name, mark, number = layer.rpartition("#")
    return name if mark and number.isdecimal() else layer
