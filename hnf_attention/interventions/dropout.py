"""Attention dropout of a layer: where modules keep it, and raising it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from ..names import display_name, named_modules

# Names of the probability of *attention* dropout (residual and output dropouts have other names).
NAMES = ("attn_dropout", "attention_dropout", "attn_drop", "attn_pdrop", "dropout_p", "dropout")
MAXIMUM = 0.5  # more than this hides the layer rather than regularising it


def raisable(model: nn.Module, layer: str) -> bool:
    """Whether the layer has an attention dropout that is not at its maximum yet."""
    module = dict(named_modules(model)).get(layer)
    return module is not None and any(getattr(holder, name) < MAXIMUM for holder, name in _places(module))


def increase(model: nn.Module, layer: str, amount: float) -> tuple[str, Callable[[], None]]:
    """Add `amount` to the layer's attention dropout, up to MAXIMUM. Returns what was done and its undoing.

    Raises ValueError for an unknown layer, or one without an attention dropout.
    """
    modules = dict(named_modules(model))
    if layer not in modules:
        raise ValueError(f"expected 'layer' to name a module of the model, got {layer!r}")
    places = _places(modules[layer])
    if not places:
        raise ValueError(
            f"expected layer {layer!r} to have an attention dropout (one of {', '.join(NAMES)}), "
            f"got {type(modules[layer]).__name__} with none of them"
        )
    before = [getattr(holder, name) for holder, name in places]
    after = [max(p, min(MAXIMUM, p + amount)) for p in before]

    def put(values: Sequence[float]) -> None:
        for (holder, name), value in zip(places, values):
            setattr(holder, name, value)

    put(after)
    return f"attention dropout of {display_name(layer)}: {before[0]:g} -> {after[0]:g}", lambda: put(before)


def _places(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """(holder, attribute) of each probability: models keep it as a module, as a number, or as both."""
    places: list[tuple[nn.Module, str]] = []
    for name in NAMES:
        value = getattr(module, name, None)
        if isinstance(value, nn.Dropout):
            places.append((value, "p"))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            places.append((module, name))
    return places
