"""What one attention call gave: its row statistics, and what a fold needs beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine import fold
from ..engine.fold import Measured
from ..reference.options import Options
from ..statistics.rows import RowStats


class Measurement:
    """One attention call, measured; B, H, M are its batch, query heads and queries.

    layer: name of the module in the instrumented model.
    rows: row statistics, (B, H, M) each, outside autograd; of a sample, (B, H, M_s) with `row_index`.
    sample_period: 1 where all rows were measured, p where one block of rows of every p was.
    head_dim: D, 1 where it is not known. dtype: the one that scores are computed from.
    query (B, H, M, D), key (B, H_kv, N, D), options: the call itself, with the model's own tensors; None
        in `Instrumentation.latest`, which keeps no tensor of the model alive, and where the call was
        caught at its softmax.

    The properties are computed when they are first read, from the call.
    """

    __slots__ = (
        "_measured",
        "dtype",
        "head_dim",
        "key",
        "layer",
        "options",
        "query",
        "rows",
        "sample_period",
    )

    def __init__(
        self,
        layer: str,
        rows: RowStats,
        query: Tensor,
        key: Tensor,
        options: Options,
        sample_period: int = 1,
    ):
        self.layer, self.rows, self.sample_period = layer, rows, sample_period
        self.query: Tensor | None = query
        self.key: Tensor | None = key
        self.options: Options | None = options
        self.head_dim, self.dtype = query.shape[3], query.dtype
        self._measured: Measured | None = None

    @classmethod
    def of_scores(
        cls,
        layer: str,
        rows: RowStats,
        measured: Measured,
        head_dim: int,
        dtype: torch.dtype,
        sample_period: int = 1,
    ) -> Measurement:
        """Of a call of which everything is known already, or will never be."""
        self = cls.__new__(cls)
        self.layer, self.rows, self.sample_period = layer, rows, sample_period
        self.query = self.key = self.options = None
        self.head_dim, self.dtype, self._measured = head_dim, dtype, measured
        return self

    @property
    def visible_keys(self) -> Tensor:
        """int64, broadcastable to the rows: how many keys each query may attend to."""
        return self._read().visible_keys

    @property
    def sink_mass(self) -> Tensor:
        """As the rows, weight on the first visible key plus the learned sink's."""
        return self._read().sink_mass

    @property
    def query_norm(self) -> Tensor:
        """(B, H), Frobenius norm of a head's Q over a sequence; NaN where Q is not known."""
        return self._read().query_square.sum(-1).sqrt()

    @property
    def key_norm(self) -> Tensor:
        """(B, H), Frobenius norm of the K that a query head sees, over a sequence; NaN likewise."""
        return self._read().key_square.sum(-1).sqrt()

    def fold_into(self, accumulator: Tensor) -> None:
        """Add the call to its layer's accumulator."""
        if self.query is None:
            fold.fold_measured(accumulator, self.rows, self._measured)
        else:
            fold.fold(accumulator, self.query, self.key, self.rows, self.options)

    def release(self) -> None:
        """Compute what is not yet computed, and let go of the model's tensors."""
        self._read()
        self.query = self.key = self.options = None

    def _read(self) -> Measured:
        if self._measured is None:
            self._measured = fold.measure(self.query, self.key, self.rows, self.options)
        return self._measured
