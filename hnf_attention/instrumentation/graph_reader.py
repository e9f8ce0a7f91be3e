"""What a compiled graph measures by itself, and who reads it: between the graph's operator and a recorder.

A replayed CUDA graph runs no Python, so it can deliver no `Measurement`. It folds its calls into tensors on the device
that a reader keeps, as far as the reader's control says.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from ..engine.graphed import State


class GraphKind(NamedTuple):
    """What the calls of one state have in common: the layer's name, and the shape of its heads."""

    layer: str
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


class GraphReader(Protocol):
    """Keeps the states of one model's layers.

    wanted, number: of the control, as it was last told to the device: what is wanted of the forward that runs, and the
    number of this forward, 0 for one without grad.
    """

    wanted: int
    number: int

    def state(self, kind: GraphKind) -> State:
        """The state of this kind, a new one if there is none. Its tensors stay where they are."""
