"""HNF curvature of attention, in log2: the exponential in it overflows any float where it matters."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def hnf_curvature_bound(
    query_norm: ArrayLike, key_norm: ArrayLike, head_dim: int, max_abs_logit: ArrayLike
) -> np.ndarray:
    """log2 of the HNF curvature bound of attention, per head.

    The bound is `kappa = |Q| |K| / d * exp(2 max|Q K^T| / sqrt(d))` (the project's HNF proposal), so

        log2 kappa = log2 |Q| + log2 |K| - log2 d + 2 log2(e) max|Q K^T| / sqrt(d).

    query_norm, key_norm: norms of a head's Q and K over the sequence, >= 0. The equation takes
    spectral norms; a sequence's Frobenius norms are upper bounds of them (by at most sqrt(d)), so with
    those the result is an upper bound as well, by at most log2(d). `HeadStats` holds the root mean
    square of Frobenius norms over the sequences, which stands for a typical sequence of the batch.
    head_dim: d, an integer >= 1.
    max_abs_logit: largest |score| of the head, nats. With the usual scale that is max|Q K^T| / sqrt(d);
    a soft-cap or a bias is part of the score, as the softmax sees it.

    Arguments broadcast. Returns float64, in bits: an index of saturation (the conditioning of the
    inverse, hence of gradients), not of forward error. A zero norm gives -inf, NaN stays NaN.
    Raises ValueError for a head_dim below 1 or a negative norm or logit.
    """
    if isinstance(head_dim, bool) or not isinstance(head_dim, (int, np.integer)) or head_dim < 1:
        raise ValueError(f"expected head_dim to be an int >= 1, got {head_dim!r}")
    named = {"query_norm": query_norm, "key_norm": key_norm, "max_abs_logit": max_abs_logit}
    arrays = {name: np.asarray(value, dtype=np.float64) for name, value in named.items()}
    for name, array in arrays.items():
        if (array < 0).any():
            raise ValueError(f"expected {name} >= 0, got {array.min()}")
    with np.errstate(divide="ignore"):
        log_norms = np.log2(arrays["query_norm"]) + np.log2(arrays["key_norm"])
    return log_norms - np.log2(head_dim) + 2.0 * np.log2(np.e) * arrays["max_abs_logit"]
