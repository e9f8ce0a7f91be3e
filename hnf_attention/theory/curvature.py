"""HNF curvature of attention: the HNF proposal's bound, in log2 (its exponential overflows floats), and HNF's own."""

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
    spectral norms; a sequence's Frobenius norms are larger by a factor of at most sqrt(d). They give
    an upper bound too, higher by at most log2(d). `HeadStats` holds the root mean square of Frobenius norms
    over the sequences, which stands for a typical sequence of the batch.
    head_dim: d, an integer >= 1.
    max_abs_logit: largest |score| of the head, nats. With the usual scale that is max|Q K^T| / sqrt(d);
    a soft-cap or a bias is part of the score, as the softmax sees it.

    Arguments broadcast. Returns float64, in bits: an index of saturation (the conditioning of the
    inverse, hence of gradients), not of forward error. A zero norm gives -inf, NaN stays NaN.
    Raises ValueError for a head_dim below 1 or a negative norm or logit.
    """
    named = {"query_norm": query_norm, "key_norm": key_norm, "max_abs_logit": max_abs_logit}
    arrays = _checked(head_dim, named)
    with np.errstate(divide="ignore"):
        log_norms = np.log2(arrays["query_norm"]) + np.log2(arrays["key_norm"])
    return log_norms - np.log2(head_dim) + 2.0 * np.log2(np.e) * arrays["max_abs_logit"]


def hnf_curvature(
    query_norm: ArrayLike, key_norm: ArrayLike, head_dim: int, *, scale: float | None = None
) -> np.ndarray:
    """HNF's own curvature of attention weights, half the norm of their second derivative in (Q, K). Proved.

        kappa = |D2 f| / 2 <= scale^2 (|Q|^2 + |K|^2) / (2 sqrt 2) + scale / 4,    f(Q, K) = softmax(scale Q K^T)

    From D2 f[h, h] = D2 softmax[dS, dS] + J d2S with |dS| <= scale sqrt(|Q|^2 + |K|^2) |h|, |d2S| <= scale
    |h|^2, |J| <= 1/2 and |D2 softmax| <= 1/sqrt 2. Numerically the last one's supremum is 0.2722 =
    sqrt 2 / (3 sqrt 3), at p = (0.211, 0.789): the first term is likely 2.6 times too large.

    query_norm, key_norm: spectral norms of a head's Q and K; Frobenius norms give an upper bound as well.
    scale: None means head_dim^-1/2. A forward quantity: it grows only with the squared norms.
    `hnf_curvature_bound`, the conditioning of the inverse, grows exponentially with the scores.
    Arguments broadcast; float64, per squared unit of q and k. Raises ValueError as `hnf_curvature_bound`.
    """
    arrays = _checked(head_dim, {"query_norm": query_norm, "key_norm": key_norm})
    scale = float(head_dim) ** -0.5 if scale is None else float(scale)
    query, key = (scale * arrays[name] for name in ("query_norm", "key_norm"))
    return (query**2 + key**2) / (2.0 * np.sqrt(2.0)) + scale / 4.0


def _checked(head_dim: int, named: dict[str, ArrayLike]) -> dict[str, np.ndarray]:
    if isinstance(head_dim, bool) or not isinstance(head_dim, (int, np.integer)) or head_dim < 1:
        raise ValueError(f"expected head_dim to be an int >= 1, got {head_dim!r}")
    arrays = {name: np.asarray(value, dtype=np.float64) for name, value in named.items()}
    for name, array in arrays.items():
        if (array < 0).any():
            raise ValueError(f"expected {name} >= 0, got {array.min()}")
    return arrays
