"""The items that an intervention of each action may have."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

#: What every intervention may have.
COMMON = ("action", "reason", "then")
#: The further items of each action.
ITEMS: dict[str, tuple[str, ...]] = {
    "reduce_lr": ("factor",),
    "increase_dropout": ("layer", "amount"),
    "qk_clip": ("threshold", "layers", "lr_factor"),
    "temperature": ("layers",),
    "standing_qk_clip": ("threshold", "measure"),
    "qk_norm": ("layers", "least", "most"),
    "rewind": ("before",),
    "rewarm_lr": ("steps", "floor"),
    "qk_rate": ("factor", "layers"),
    "sigma_reparam": ("layers",),
    "set_eps": ("eps",),
    "skip_spikes": ("limit",),
    "softcap": ("layers", "cap"),
    "precision": ("layers",),
    "prune_heads": ("layers",),
}


def check_items(intervention: Any) -> None:
    """Raise ValueError unless it is a dict with a known action, and with items of that action alone.

    A misspelt item would leave its default in force.
    """
    if not isinstance(intervention, Mapping):
        raise ValueError(f"expected an intervention (a dict with an 'action'), got {intervention!r}")
    action = intervention.get("action")
    if action not in tuple(ITEMS):
        raise ValueError(f"expected intervention['action'] in {tuple(ITEMS)}, got {action!r}")
    known = (*COMMON, *ITEMS[action])
    for name in intervention:
        if name not in known:
            near = get_close_matches(str(name), known, 1)
            meant = f": is {near[0]!r} meant?" if near else ""
            raise ValueError(f"expected items of {action} in {known}, got {name!r}{meant}")
    more = intervention.get("then", ())
    if not isinstance(more, (list, tuple)) or not all(isinstance(one, Mapping) for one in more):
        raise ValueError(f"expected 'then' to be a list of interventions, got {more!r}")
