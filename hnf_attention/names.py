"""How a layer is named to people."""

from __future__ import annotations


def shown(layer: str) -> str:
    """A module's name in its model; the model itself has an empty one, which would leave a gap in a sentence."""
    return layer or "(the model itself)"
