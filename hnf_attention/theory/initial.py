"""Scores before training: their spread, their maximum, the entropy they leave, the temperature they need.

The model: inputs of the query and key projections are isotropic with unit variance (what a norm layer
gives), weights independent with standard deviations sigma_q, sigma_k. A row's scores are then Gaussian.
sigma: standard deviation of the scores of a row, nats; n: visible keys.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import ArrayLike

_MEDIAN_LIKE = np.log(
    0.5264
)  # Blom-type constant: mean of the maximum of n Gaussians, within 1.5% from n = 4
_SHARP = 40.0  # nats: from here on the two largest scores of a row decide its entropy
_FEW = {1: 0.0, 2: np.pi**-0.5, 3: 1.5 * np.pi**-0.5}  # exact means of the maximum


def score_std(
    d_model: ArrayLike,
    head_dim: ArrayLike,
    query_std: ArrayLike,
    key_std: ArrayLike,
    *,
    gain: ArrayLike = 1.0,
    scale: ArrayLike | None = None,
    correlation: ArrayLike = 0.0,
) -> np.ndarray:
    """Standard deviation of a row's scores at initialisation, nats.

        sigma = scale sqrt(d_head) d_model sigma_q sigma_k g^2 sqrt(1 - rho)

    scale: None means d_head^-1/2, at which the head dimension drops out. gain: of the norm layer before
    the projections. correlation: mean cosine rho of the inputs of different tokens, whose common part
    moves all scores of a row alike. Source: own derivation, variance of a bilinear form.
    """
    head_dim = np.asarray(head_dim, np.float64)
    scale = head_dim**-0.5 if scale is None else np.asarray(scale, np.float64)
    product = np.asarray(d_model, np.float64) * np.asarray(query_std) * np.asarray(key_std, np.float64)
    return scale * np.sqrt(head_dim) * product * np.square(gain) * np.sqrt(1.0 - np.asarray(correlation))


def critical_std(keys: ArrayLike) -> np.ndarray:
    """sigma_c = sqrt(2 ln n), nats: beyond it a few keys hold a row's weight. inf for one key.

    Source: the freezing transition of the random energy model, Derrida, Phys. Rev. B 24, 1981.
    """
    n = _keys(keys)
    return np.where(n == 1, np.inf, np.sqrt(2.0 * np.log(n)))


def critical_temperature(
    d_model: ArrayLike,
    head_dim: ArrayLike,
    query_std: ArrayLike,
    key_std: ArrayLike,
    keys: ArrayLike,
    *,
    gain: ArrayLike = 1.0,
    correlation: ArrayLike = 0.0,
) -> np.ndarray:
    """T_c, with s = q.k / T, at which sigma equals sigma_c; usual is T = sqrt(d_head). 0 for one key.

        T_c = sqrt(d_head) d_model sigma_q sigma_k g^2 sqrt(1 - rho) / sqrt(2 ln n)

    Stable from 2 T_c on (sigma <= sigma_c / 2). Source: `score_std` and `critical_std`.
    """
    std = score_std(d_model, head_dim, query_std, key_std, gain=gain, scale=1.0, correlation=correlation)
    return std / critical_std(keys)


def row_spread(head_dim: ArrayLike, share: float = 0.99) -> np.ndarray:
    """Quantile of a row's sigma over the root mean square sigma: this share of the rows lies below it.

    A row's sigma follows |q|, and |q|^2 / its mean is chi-squared with d_head degrees of freedom over
    d_head: few dimensions make rows unequal (d_head = 2: factor 2.15 for one row in a hundred; 64: 1.21).
    Source: Wilson and Hilferty, PNAS 17, 1931, for the quantile (within 1% from d_head = 1 on at 0.99).
    """
    d = np.asarray(head_dim, np.float64)
    quantile = torch.special.ndtri(torch.tensor(share, dtype=torch.float64)).item()
    cube = 1.0 - 2.0 / (9.0 * d) + quantile * np.sqrt(2.0 / (9.0 * d))
    return np.maximum(cube, 0.0) ** 1.5


def expected_max_logit(std: ArrayLike, keys: ArrayLike) -> np.ndarray:
    """Mean of the largest of n Gaussian scores of mean 0, nats: sigma Phi^-1(0.5264^(1/n)).

    Within 1.5% for n >= 4, exact below; sqrt(2 ln n) would be 11 to 62% high. keys: real, >= 1, up to 1e300.
    Source: own fit [n = 4 to 16k]; compare Blom, Statistical Estimates and Transformed Beta-Variables, 1958.
    """
    n = _keys(keys)
    # The upper tail 1 - 0.5264^(1/n), which keeps its digits for large n.
    tail = -np.expm1(_MEDIAN_LIKE / n)
    top = -torch.special.ndtri(torch.as_tensor(tail)).numpy()
    for few, exact in _FEW.items():
        top = np.where(n == few, exact, top)
    return np.asarray(std, np.float64) * top


def entropy_law(std: ArrayLike, keys: ArrayLike) -> np.ndarray:
    """Entropy of a row of n Gaussian scores over ln n, in closed form: 1 - (sigma / sigma_c)^2, at least 0.

    The limit of many keys; `expected_entropy` is exact. For n >= 256 this is low by up to 0.03 at sigma_c / 2.
    From sigma_c on it is 0, though rows of a real length still have entropy. 1 for one key.
    Source: the random energy model, Derrida 1981.
    """
    return np.maximum(1.0 - np.square(np.asarray(std, np.float64) / critical_std(keys)), 0.0)


def expected_entropy(std: ArrayLike, keys: ArrayLike) -> np.ndarray:
    """Mean entropy of a row of n independent Gaussian scores, nats; exact up to quadrature (1e-3 nats).

        E log Z = int (e^-t - phi(t)^n) dt / t,   phi(t) = E exp(-t e^(sigma g)),
        E H = E log Z - d/d log sigma of it = E log Z - n int phi^(n-1) E[sigma g e^(sigma g) exp(-t e^(sigma g))] dt

    in log t, with the trapezoidal rule. From sigma = 40 on, the gap of the two largest scores decides:
    E H = pi^2 r / (6 sigma) (1 + c / sigma). r = n (n - 1) int density^2 distribution^(n-2) is its density at 0
    for unit Gaussians. c matches the quadrature at 40.
    Source: own derivation from the Laplace transform of log Z.
    """
    std, n = np.broadcast_arrays(np.asarray(std, np.float64), _keys(keys))
    if (std < 0).any():
        raise ValueError(f"expected std >= 0, got {std.min()}")
    pairs, inverse = np.unique(np.stack([std.ravel(), n.ravel()]), axis=1, return_inverse=True)
    values = np.array([_entropy(*pair) for pair in pairs.T])
    return values[inverse.ravel()].reshape(std.shape)


@lru_cache(maxsize=65536)
def _entropy(std: float, n: float) -> float:
    full = float(np.log(n))
    if n == 1 or std < 1e-6:
        return full
    if std > _SHARP:
        at = np.pi**2 / 6.0 * _gap_density(n) / np.array([_SHARP, std])
        # A third score's share falls as 1 / sigma; the quadrature at _SHARP gives its size.
        third = (_entropy(_SHARP, n) / at[0] - 1.0) * _SHARP / std
        return float(min(full, at[1] * (1.0 + third)))
    g = np.linspace(-9.0, 9.0, 721)
    density = np.exp(-(g**2) / 2.0)
    density /= density.sum()
    s = std * g
    log_t = np.linspace(-(9.0 * std + 45.0), 9.0 * std + 6.0, int(400 + 40 * std))
    step = log_t[1] - log_t[0]
    exponent = np.exp(np.minimum(log_t[:, None] + s, 700.0))
    # log phi from 1 - phi, which keeps its digits where n - 1 of the keys hardly count.
    log_phi = np.log1p(-np.minimum(-np.expm1(-exponent) @ density, 1.0 - 2.0**-53))
    log_z = (np.exp(-np.exp(np.minimum(log_t, 700.0))) - np.exp(n * log_phi)).sum() * step
    slope = (n * np.exp((n - 1.0) * log_phi) * ((exponent * np.exp(-exponent)) @ (density * s))).sum() * step
    return float(np.clip(log_z - slope, 0.0, full))


def _gap_density(n: float) -> float:
    g = torch.linspace(-12.0, 45.0, 5701, dtype=torch.float64)
    log_density = -(g**2) / 2.0 - np.log(2.0 * np.pi) / 2.0
    log_rest = torch.special.log_ndtr(g)
    total = torch.exp(np.log(n) + np.log(n - 1.0) + 2.0 * log_density + (n - 2.0) * log_rest).sum()
    return float(total * (g[1] - g[0]))


def _keys(keys: ArrayLike) -> np.ndarray:
    n = np.asarray(keys, np.float64)
    if not (n >= 1).all():
        raise ValueError(f"expected at least 1 visible key, got {n.min()}")
    return n
