"""Private names of xformers. Nothing of it is imported here."""

from __future__ import annotations

from typing import Any


def local_window(bias: Any) -> int | None:
    """How many keys a query of this block-diagonal mask sees at most, itself included; None for no bound.

    Missing: None. The lse that the library returns then differs from ours, where it is asked for.
    """
    return getattr(bias, "_window_size", 0) or None
