"""Short names for layers."""

from __future__ import annotations

from collections.abc import Iterable


def layer_labels(names: Iterable[str]) -> list[str]:
    """Layer names without the leading parts that all of them share.

    `["model.layers.0.attn", "model.layers.1.attn"]` gives `["0.attn", "1.attn"]`; one name alone is
    kept whole. The model itself (name "") becomes "(model)".
    """
    parts = [name.split(".") for name in names]
    shared = 0
    if len(parts) > 1:
        while len({tuple(part[: shared + 1]) for part in parts}) == 1 and shared < min(map(len, parts)) - 1:
            shared += 1
    return [".".join(part[shared:]) or "(model)" for part in parts]
