"""What rounding does to a head, from its folded maxima: curvature, error bound, the bits it needs."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np

from .. import theory

# The fold's squares and scores are sums in fp32, of up to 256 terms: what they may be too small by, relative.
_SLACK = 2.0**-15
# sqrt(p (1 - p) (1 - p^2)) is largest here: rows this sharp are moved most by errors of their scores.
_MOST_SENSITIVE = 0.39


class HeadPrecision:
    """The part of `HeadStats` that the theory gives, without looking at the device again; (H,) float64 each."""

    head_dim: int
    dtype: str

    @property
    @abstractmethod
    def sampled(self) -> bool: ...

    @property
    @abstractmethod
    def num_heads(self) -> int: ...

    @property
    @abstractmethod
    def max_abs_logit(self) -> np.ndarray: ...

    @abstractmethod
    def _mean(self, name: str, over: str) -> np.ndarray: ...

    @abstractmethod
    def _max(self, name: str) -> np.ndarray: ...

    @property
    def query_norm(self) -> np.ndarray:
        """Frobenius norm of Q over a sequence, root mean square over sequences; NaN where Q was not seen."""
        return self._norm("query_square")

    @property
    def key_norm(self) -> np.ndarray:
        """Of K, as `query_norm`."""
        return self._norm("key_square")

    @property
    def key_length(self) -> np.ndarray:
        """Largest |k| over rows; NaN where K was not seen."""
        square = self._max("key_square")
        return np.sqrt(np.where(np.isinf(square), np.nan, square))

    def _norm(self, name: str) -> np.ndarray:
        square = self._mean(name, "sequences")
        return np.sqrt(np.where(square == 0, np.nan, square))

    @property
    def log2_curvature(self) -> np.ndarray:
        """log2 of the HNF curvature bound, bits."""
        return theory.hnf_curvature_bound(self.query_norm, self.key_norm, self.head_dim, self.max_abs_logit)

    @property
    def score_magnitude(self) -> np.ndarray:
        """scale * max|q| * max|k| over rows, nats, at least every scale * sum |q_c k_c|; NaN where unknown or 0."""
        square = self._max("query_square") * self._max("key_square")
        return np.sqrt(np.where((square == 0) | np.isinf(square), np.nan, square)) * (1.0 + _SLACK)

    @property
    def error_bound(self) -> np.ndarray:
        """Proved limit of the error of a fused call in `dtype`, in units of the largest |v|; of all its rows.

        `theory.forward_error_bound_from_norms` of `theory.flash(dtype).on_tensor_cores`, or of
        `theory.eight_bit_flash(dtype)`, for values from -1 to 1. NaN where q or k was not seen, with a soft-cap or
        learned sinks, for fp64, and for more keys than the kernel's sums can hold: the theory says nothing there.
        """
        size, kind = self.score_magnitude, self._max("score_kind")
        keys = int(np.nan_to_num(self._max("num_keys")).max(initial=0.0))
        known: dict[str, Any] = {}
        if self.sampled:  # rows that nobody saw may have larger scores, and other weights
            top = np.full_like(size, np.inf)
        else:
            top = self.max_abs_logit + _SLACK * size
            known = {"max_abs_score": top, "max_weight": (self._least_weight, 1.0)}
        with_bias = 2.0 * size + top  # |bias| <= |s| + scale |q.k|
        size = np.select([kind == 0, kind == 1], [size, with_bias], np.nan)
        try:
            storage = theory.number_format(self.dtype)
            eight_bit = storage.is_eight_bit
            arithmetic = (
                theory.eight_bit_flash(storage) if eight_bit else theory.flash(storage).on_tensor_cores
            )
            return theory.forward_error_bound_from_norms(
                size, 1.0, 2.0, self.head_dim, keys, arithmetic, **known
            )
        except ValueError:
            return np.full(self.num_heads, np.nan)

    @property
    def _least_weight(self) -> np.ndarray:
        """No row's largest weight is smaller; 0 where not all rows were seen."""
        if self.sampled:
            return np.zeros(self.num_heads)
        # A weight's relative error is the absolute error of its scores and of the maximum minus lse.
        size = (self.head_dim + 8.0) * self.score_magnitude + 3.0 * self.max_abs_logit + 16.0
        return np.clip(-self._max("neg_max_weight") - 2.0 * theory.TENSOR_CORE_UNIT * size, 0.0, 1.0)

    @property
    def required_bits(self) -> np.ndarray:
        """Significand bits of q and k that keep every output within 1% of the values' spread: cannot fail.

        `theory.required_bits` of `score_magnitude` and the least of the rows' largest weights (where all rows
        were seen) at `theory.TOLERANCE`. NaN where the magnitude is NaN.
        """
        size, weight = self.score_magnitude, self._least_weight
        return theory.required_bits("query_key", size, theory.TOLERANCE, max_weight=weight)

    @property
    def typical_bits(self) -> np.ndarray:
        """Bits that usually suffice for the most sensitive max_weight in the rows' range: `theory.typical_bits`."""
        least, most = -self._max("neg_max_weight"), self._max("max_weight")
        weight = np.clip(_MOST_SENSITIVE, least, np.fmax(least, most))
        spread = np.sqrt(weight * (1.0 - weight) * (1.0 - weight**2)) / 4.0
        size = np.sqrt(2.0 / self.head_dim) * self.score_magnitude
        return theory.typical_bits("query_key", size, spread, theory.TOLERANCE)
