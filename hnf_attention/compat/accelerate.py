"""Private names of accelerate. Nothing of it is imported here."""

from __future__ import annotations

from torch import nn


def offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings the module's weights for each call; between calls they are on the meta device.

    Missing: False. A trace of an offloaded model is then refused.
    """
    return getattr(module, "_hf_hook", None) is not None
