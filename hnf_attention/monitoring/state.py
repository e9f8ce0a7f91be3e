"""Snapshots as JSON types, so that a checkpoint can hold what a monitor has seen."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..statistics.fields import HISTOGRAM_BINS, MAX_FIELDS, STEP_FIELDS, SUM_FIELDS
from ..statistics.heads import Forwards, HeadStats, Snapshot


def fields() -> list[str]:
    """What the rows of `HeadStats.values` are; another version of this package may have others."""
    return [
        *SUM_FIELDS,
        *(f"bin {index}" for index in range(HISTOGRAM_BINS)),
        *(f"max {x}" for x in MAX_FIELDS),
        *(f"step {x}" for x in STEP_FIELDS),
    ]


def dump(snapshot: Snapshot) -> dict[str, Any]:
    """A snapshot as JSON types. The numbers are base64 text of little-endian floats, a tenth of the size of digits."""
    return {
        "step": snapshot.step,
        "training": snapshot.training,
        "forwards": list(snapshot.forwards),
        "jumped": snapshot.jumped,
        "layers": {name: _dump_layer(stats) for name, stats in snapshot.layers.items()},
    }


def load(state: Mapping[str, Any]) -> Snapshot:
    """The snapshot that `dump` gave."""
    layers = {name: _load_layer(layer) for name, layer in state["layers"].items()}
    jumped = state.get("jumped", False)  # states of before have none
    return Snapshot(state["step"], layers, state["training"], Forwards(*state["forwards"]), jumped)


def checked_done(done: Any) -> int | None:
    """The `done` of a state's good states, None for a state without. Raises ValueError for anything else."""
    if done is not None and (isinstance(done, bool) or not isinstance(done, int) or done < 0):
        raise ValueError(f"expected 'done' to be an int >= 0 or None, got {done!r}")
    return done


def _dump_layer(stats: HeadStats) -> dict[str, Any]:
    kind = f"<f{stats.values.itemsize}"
    return {
        "head_dim": stats.head_dim,
        "dtype": stats.dtype,
        "sample_period": stats.sample_period,
        "shape": list(stats.values.shape),
        "kind": kind,
        "values": b64encode(stats.values.astype(kind).tobytes()).decode(),
    }


def _load_layer(state: Mapping[str, Any]) -> HeadStats:
    shape: Sequence[int] = state["shape"]
    values = np.frombuffer(b64decode(state["values"]), dtype=state["kind"]).reshape(shape)
    native = values.astype(values.dtype.newbyteorder("="))
    return HeadStats(native, state["head_dim"], state["dtype"], state["sample_period"])
