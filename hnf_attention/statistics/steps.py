"""What the steps between two snapshots showed, which were not measured."""

from __future__ import annotations

import numpy as np

from .fields import NUM_FOLDED, STEP_FIELDS


class HeadSteps:
    """The extremes of a head over these steps. A `HeadStats` inherits them; each is float64 (H,), NaN for nothing.

    Each forward takes one block of rows of each sequence, and the next forward takes the next one. The largest score
    and range are therefore lower bounds: other rows may have had larger ones. Forwards without grad are left out.
    """

    values: np.ndarray

    def _step(self, name: str) -> np.ndarray:
        value = self.values[NUM_FOLDED + STEP_FIELDS.index(name)].astype(np.float64, copy=False)
        return np.where(value == -np.inf, np.nan, value)

    @property
    def between_max_logit(self) -> np.ndarray:
        """Largest score of the rows that were taken, nats."""
        return self._step("max_logit")

    @property
    def between_logit_range(self) -> np.ndarray:
        """Largest range of the scores of one of these rows, nats."""
        return self._step("logit_range")

    @property
    def first_nonfinite_query(self) -> np.ndarray:
        """Number of the first step whose queries held NaN or inf, as far as the output did, too."""
        return -self._step("neg_first_query")

    @property
    def first_nonfinite_key(self) -> np.ndarray:
        """Likewise for keys."""
        return -self._step("neg_first_key")

    @property
    def first_nonfinite_value(self) -> np.ndarray:
        """Likewise for values."""
        return -self._step("neg_first_value")

    @property
    def first_nonfinite_out(self) -> np.ndarray:
        """Number of the first step whose outputs held NaN or inf."""
        return -self._step("neg_first_out")

    @property
    def first_nonfinite_step(self) -> np.ndarray:
        """Number of the first step in which queries, keys, values or outputs held NaN or inf."""
        firsts = (self.first_nonfinite_query, self.first_nonfinite_key, self.first_nonfinite_value)
        return np.fmin(np.fmin.reduce(firsts), self.first_nonfinite_out)

    @property
    def first_nonfinite_forward(self) -> np.ndarray:
        """Number of the forward in which that was, counted from the first that was measured or kept."""
        return -self._step("neg_first_forward")
