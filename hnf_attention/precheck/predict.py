"""The scores of a design at initialisation, from the design alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from .. import theory
from ..diagnosis.thresholds import threshold
from .design import Design

# Limits of sigma / sigma_c in the sharpest row of a hundred. At n = 1024 and 1, 1.5, 2 and 4 sigma_c, 2%, 13%, 30%
# and 63% of the rows have an entropy below half a nat. Up to 0.5 sigma_c the entropy is above 3/4 of its maximum.
SAFE_RATIO, UNSTABLE_RATIO = 0.5, 1.0
STABLE, MARGINAL, UNSTABLE = "stable", "marginal", "unstable"
NOT_KNOWN = "not known"  # the verdict on scores that nothing says how to predict
VERDICTS = (STABLE, MARGINAL, UNSTABLE)  # best first


@dataclass(frozen=True)
class Scores:
    """The scores of one layer at one length, in nats unless said otherwise.

    score_std: root mean square over the rows of the spread within a row. row_std: the spread of the sharpest row
        of a hundred.
    sigma_ratio: row_std over the critical spread of `keys` keys; stable up to 0.5, unstable from 1 on.
    expected_logit_max: mean of a row's largest score minus its mean score.
    max_abs_logit: largest |score| of a sequence.
    magnitude: scale |q| |k| of the longest q and k of a sequence.
    normalized_entropy: expected entropy over ln(keys).
    log2_curvature: HNF's bound, in bits.
    """

    layer: str
    keys: int
    score_std: float
    row_std: float
    sigma_ratio: float
    expected_logit_max: float
    max_abs_logit: float
    magnitude: float
    normalized_entropy: float
    log2_curvature: float
    source: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def predict_layer(design: Design, layer: int) -> Scores:
    """The numbers of one layer at initialisation."""
    std, row_std = _spread(design, layer)
    magnitude = _magnitude(design, layer)
    source = "measured: its class, with random weights" if design.spread else "predicted: initialisation"
    return scores(design, layer, f"layer {layer}", std, row_std, magnitude, source)


def predict_layers(design: Design) -> list[Scores]:
    """The numbers of every layer. Each kind of layer is computed once: most designs have one, or two."""
    known: dict[tuple[int, float, float], Scores] = {}
    for layer in range(design.n_layers):
        kind = design.kind_of(layer)
        known[kind] = known.get(kind) or predict_layer(design, layer)
    return [replace(known[design.kind_of(layer)], layer=f"layer {layer}") for layer in range(design.n_layers)]


def sigma_ratio(design: Design, layer: int = 0) -> float:
    """sigma / sigma_c of the sharpest row of a hundred, which the verdict rests on; 0 for a single key."""
    return _ratio(design, layer, _spread(design, layer)[1])


def worst_layer(design: Design) -> tuple[float, float]:
    """The largest sigma / sigma_c and the largest |score| (nats) of any layer."""
    found = []
    for layer in {design.kind_of(layer): layer for layer in range(design.n_layers)}.values():
        row_std = _spread(design, layer)[1]
        largest = _largest(design, layer, row_std, _magnitude(design, layer))
        found.append((_ratio(design, layer, row_std), largest))
    ratios, largest_scores = zip(*found, strict=True)
    return max(ratios), max(largest_scores)


def verdict(ratio: float, max_abs_logit: float) -> str:
    """ "stable", "marginal" or "unstable", from a design's worst layer."""
    if ratio >= UNSTABLE_RATIO or max_abs_logit > threshold("deteriorating_logit"):
        return UNSTABLE
    return STABLE if ratio <= SAFE_RATIO else MARGINAL


def scores(
    design: Design, layer: int, name: str, std: float, row_std: float, magnitude: float, source: str
) -> Scores:
    """The numbers of a layer whose scores have this spread (nats) and magnitude."""
    keys = design.keys(layer)
    largest = _largest(design, layer, row_std, magnitude)
    # A Gaussian N x D matrix has a spectral norm near (root mean square element) * (sqrt N + sqrt D).
    size = math.sqrt(design.seq_len) + math.sqrt(design.head_dim)
    query, key = (_element(design, std) * size for std in (design.query_std, design.key_std))
    return Scores(
        layer=name,
        keys=keys,
        score_std=std,
        row_std=row_std,
        sigma_ratio=_ratio(design, layer, row_std),
        expected_logit_max=float(theory.expected_max_logit(std, keys)),
        max_abs_logit=largest,
        magnitude=magnitude,
        normalized_entropy=float(theory.expected_entropy(std, keys)) / math.log(keys) if keys > 1 else 1.0,
        log2_curvature=float(theory.hnf_curvature_bound(query, key, design.head_dim, largest)),
        source=source,
    )


def capped_std(std: float, softcap: float | None) -> float:
    """Standard deviation of softcap * tanh(s / softcap) for Gaussian s of this one, by quadrature."""
    if softcap is None:
        return std
    g = np.linspace(-8.0, 8.0, 1601)
    density = np.exp(-(g**2) / 2.0)
    density /= density.sum()
    return float(np.sqrt((density * (softcap * np.tanh(std * g / softcap)) ** 2).sum()))


def _spread(design: Design, layer: int) -> tuple[float, float]:
    """score_std and row_std of `Scores`."""
    scale = design.scale_of(layer)
    if design.qk_norm:  # |q| = |k| = sqrt(head_dim) for any weights, so all rows are alike
        std, factor = scale * math.sqrt(design.head_dim * (1.0 - design.correlation)), 1.0
    else:
        std = float(
            theory.score_std(
                design.d_model,
                design.head_dim,
                design.query_std,
                design.key_std,
                scale=scale,
                correlation=design.correlation,
            )
        )
        factor = float(theory.row_spread(design.head_dim))
    std *= design.spread_of(layer)
    return capped_std(std, design.softcap), capped_std(std * factor, design.softcap)


def _ratio(design: Design, layer: int, row_std: float) -> float:
    return row_std / float(theory.critical_std(design.keys(layer)))


def _magnitude(design: Design, layer: int) -> float:
    query, key = (
        _element(design, std) * math.sqrt(design.head_dim) for std in (design.query_std, design.key_std)
    )
    longest = 1.0 if design.qk_norm else float(theory.row_spread(design.head_dim, 1 - 0.5 / design.seq_len))
    return design.scale_of(layer) * design.spread_of(layer) * query * key * longest**2


def _largest(design: Design, layer: int, row_std: float, magnitude: float) -> float:
    """max_abs_logit of `Scores`."""
    # What tokens have in common moves all scores of a row alike: no spread within the row, but larger scores.
    over_rows = row_std / math.sqrt(1.0 - design.correlation)
    largest = min(float(theory.expected_max_logit(over_rows, 2.0 * design.keys(layer) ** 2)), magnitude)
    return largest if design.softcap is None else min(largest, design.softcap)


def _element(design: Design, weight_std: float) -> float:
    """Root mean square element of the q or k that a projection with such weights makes."""
    return 1.0 if design.qk_norm else weight_std * math.sqrt(design.d_model)
