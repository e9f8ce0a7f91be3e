"""What one attention call gave: its row statistics, and what a fold needs beside them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..reference.context import UNKNOWN, Context
from ..reference.measured import Measured, measure
from ..reference.options import Options
from ..statistics.rows import RowStats


@dataclass(slots=True, eq=False)
class Forward:
    """One forward pass of an instrumented model.

    number: counts the measured forwards of the model, from 1.
    training: whether gradients were enabled when the model was called. Inside it they may be off: a reentrant
        checkpoint runs its modules without.
    failed: None while it runs, then whether it raised. It stays None if nobody can say when it ends, as for a part of
        the model that is called by itself.
    """

    number: int
    training: bool
    failed: bool | None = None


@dataclass(
    slots=True, eq=False, repr=False
)  # made for every measured call: frozen would cost four times as much
class Measurement:
    """One attention call, measured; B, H, M are its batch, query heads and queries.

    layer: the module's name in the instrumented model.
    rows: row statistics, (B, H, M) each, outside autograd; of a sample, (B, H, M_s) with `row_index`.
    head_dim: D, 1 where it is not known. dtype: of the tensors that the scores are computed from.
    sample_period: 1 where all rows were measured, p where one block of rows of every p was.
    query (B, H, M, D), key (B, H_kv, N, D), options, context: the call itself, with the model's own tensors.
    beside: what a fold needs beside the rows, where the call is not kept. `Instrumentation.latest` keeps no tensor of
        the model alive, and a call that was caught at its softmax has no known query and key.
    forward: the forward pass of the model that the call is part of; None if it is not known.
    call: how often the layer's module was invoked in that forward before.

    Either the call or `beside` is there. The properties are computed from the call whenever they are read.
    """

    layer: str
    rows: RowStats
    head_dim: int
    dtype: torch.dtype
    sample_period: int = 1
    query: Tensor | None = None
    key: Tensor | None = None
    options: Options | None = None
    context: Context = UNKNOWN
    beside: Measured | None = None
    forward: Forward | None = None
    call: int = 0

    def __repr__(self) -> str:
        lse, sampled = self.rows.lse, f", 1/{self.sample_period} of all" if self.sample_period > 1 else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"Measurement of {self.layer!r}: {tuple(lse.shape)} rows{sampled}, "
            f"head dimension {self.head_dim}, {dtype} on {lse.device}"
        )

    @property
    def visible_keys(self) -> Tensor:
        """int64, broadcastable to the rows: how many keys each query may attend to."""
        return beside_rows(self).visible_keys.clamp(min=0)

    @property
    def sink_mass(self) -> Tensor:
        """As the rows: weight on the sink key and on the learned sink, see `HeadStats.sink_mass`."""
        return beside_rows(self).sink_mass

    @property
    def query_norm(self) -> Tensor:
        """(B, H), Frobenius norm of a head's Q over a sequence; NaN where Q is not known."""
        return beside_rows(self).query_square.sum(-1).sqrt()

    @property
    def key_norm(self) -> Tensor:
        """(B, H), Frobenius norm of the K that a query head sees, over a sequence; NaN where K is not known."""
        return beside_rows(self).key_square.sum(-1).sqrt()


def beside_rows(measurement: Measurement) -> Measured:
    """What a fold needs beside the row statistics, computed from the call if it is not there.

    Raises ValueError for a measurement with neither.
    """
    if measurement.beside is not None:
        return measurement.beside
    query, key, options = measurement.query, measurement.key, measurement.options
    if query is None or key is None or options is None:
        raise ValueError("expected a measurement with its call or with `beside`, got neither")
    return measure(query, key, measurement.rows, options, measurement.context)


def without_call(measurement: Measurement) -> Measurement:
    """The same numbers, without the model's tensors."""
    return replace(measurement, query=None, key=None, options=None, beside=beside_rows(measurement))
