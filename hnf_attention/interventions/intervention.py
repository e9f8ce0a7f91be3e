"""What an intervention is: a dict that says which fix, where, how strong and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn


class Intervention(dict[str, Any]):
    """A proposed fix, JSON-able. A monitor's own also knows its `model`, which is not an item.

    reduce_lr: {'action', 'factor' (at most 1), 'reason'}.
    increase_dropout: {'action', 'layer', 'reason'} and optionally 'amount' (added probability).
    qk_clip: {'action', 'threshold', 'layers': {layer: [largest |score| of each head]}, 'reason'}, and
        'lr_factor' where the learning rate should fall as well.
    temperature: {'action', 'layers': {layer: [factor of each head]}, 'reason'}.
    standing_qk_clip: {'action', 'reason'} and optionally 'threshold' and 'measure', as for `QKClip`.
    qk_norm: {'action', 'reason'} and optionally 'layers' (a list of names), 'least' and 'most', as for `start_qk_norm`.
    rewind: {'action', 'before' (the step of the alarm), 'reason'}; the model needs a `GoodStates`.
    rewarm_lr: {'action', 'reason'} and optionally 'steps' (100) and 'floor' (0.1, of the rate).
    qk_rate: {'action', 'factor', 'layers': {layer: number of heads}, 'reason'}.
    set_eps: {'action', 'eps', 'reason'}. skip_spikes: {'action', 'reason'} and optionally 'limit' (6, in deviations).
    sigma_reparam: {'action', 'layers': {layer: number of heads}, 'reason'}.
    softcap: {'action', 'layers' (a list of names), 'reason'} and optionally 'cap' (50, nats).
    precision: {'action', 'layers' (a list of names), 'reason'}.
    prune_heads: {'action', 'layers': {layer: [numbers of heads]}, 'reason'}.
    Each may have 'then': a list of further ones, which are carried out after it, as one. Other items are refused.
    """

    def __init__(self, items: Mapping[str, Any], model: nn.Module | None = None):
        super().__init__(items)
        self.model = model

    def __reduce__(self) -> tuple[type[Intervention], tuple[dict[str, Any]]]:
        return Intervention, (dict(self),)

    def __repr__(self) -> str:
        items = {key: _short(key, value) for key, value in self.items()}
        return f"Intervention({', '.join(f'{key}: {text}' for key, text in items.items())})"


def shortened(text: str, limit: int = 300) -> str:
    """The text, cut to at most that many characters."""
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


def numbers_by_layer(intervention: Mapping[str, Any]) -> Mapping[str, Sequence[float | None]]:
    """The item 'layers': one number for each head of each layer. Raises ValueError for anything else."""
    layers = intervention.get("layers")
    if not isinstance(layers, Mapping) or not layers:
        raise ValueError(f"expected 'layers' to map layer names to one number per head, got {layers!r}")
    for layer, values in layers.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ValueError(f"expected one number per head for layer {layer!r}, got {values!r}")
    return layers


def positive(intervention: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """The item of that name. Raises ValueError unless it is a finite number > 0."""
    return check_positive(repr(name), intervention.get(name, default))


def share(intervention: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """The item of that name. Raises ValueError unless it is a number above 0 and at most 1."""
    value = positive(intervention, name, default)
    if value > 1:
        raise ValueError(f"expected {name!r} to be above 0 and at most 1, got {value!r}")
    return value


def check_positive(what: str, value: Any) -> float:
    """The value as a float. Raises ValueError unless it is a finite number > 0."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise ValueError(f"expected {what} to be a number > 0, got {value!r}")
    return float(value)


def _short(key: str, value: Any) -> str:
    if key == "layers" and isinstance(value, Mapping):
        return f"{len(value)} layers"
    return shortened(str(value))
