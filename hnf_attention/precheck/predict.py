"""What a design does before training: the spread of its scores, and what each number format makes of them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from .. import theory
from ..diagnosis.thresholds import threshold
from .design import Design

# Of sigma / sigma_c, of the sharpest row in a hundred. At n = 1024, 2%, 13%, 30% and 63% of the rows have an
# entropy below half a nat at 1, 1.5, 2 and 4 sigma_c; up to half of it the entropy is above 3/4 of its maximum.
SAFE_RATIO, UNSTABLE_RATIO = 0.5, 1.0
STATUSES = ("safe", "usually safe", "unsafe")


@dataclass(frozen=True)
class Scores:
    """Scores of one layer at one length. Nats, but for ratios and bits.

    score_std: root mean square over rows of the spread within a row. row_std: of the sharpest row in a hundred.
    sigma_ratio: row_std over the critical spread of `keys` keys; stable up to 0.5, unstable from 1 on.
    expected_logit_max: mean of a row's largest score; max_abs_logit: largest |score| of a whole sequence.
    magnitude: scale |q| |k| of a sequence's longest; log2_curvature: HNF's bound, the seed's formula.
    normalized_entropy: expected entropy over ln(keys).
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


def sigma_ratio(design: Design, layer: int = 0) -> float:
    """sigma / sigma_c of the sharpest row in a hundred, the number that decides; 0 for a single key."""
    return _spread(design, layer)[1] / float(theory.critical_std(design.keys(layer)))


def _spread(design: Design, layer: int) -> tuple[float, float]:
    """score_std and row_std, nats."""
    scale = design.scale_of(layer)
    if design.qk_norm:  # |q| = |k| = sqrt(head_dim) whatever the weights, in all rows alike
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
    return capped_std(std, design.softcap), capped_std(std * factor, design.softcap)


def capped_std(std: float, softcap: float | None) -> float:
    """Standard deviation of softcap * tanh(s / softcap) for Gaussian s, by quadrature."""
    if softcap is None:
        return std
    g = np.linspace(-8.0, 8.0, 1601)
    density = np.exp(-(g**2) / 2.0)
    density /= density.sum()
    return float(np.sqrt((density * (softcap * np.tanh(std * g / softcap)) ** 2).sum()))


def predict_layer(design: Design, layer: int) -> Scores:
    """The numbers of one layer at initialisation, from the design alone."""
    magnitude = _magnitude(design, layer)
    return scores(
        design, layer, f"layer {layer}", *_spread(design, layer), magnitude, "predicted: initialisation"
    )


def largest_score(design: Design, layer: int) -> float:
    """`max_abs_logit` of `predict_layer`."""
    return _largest(design, layer, _spread(design, layer)[1], _magnitude(design, layer))


def _magnitude(design: Design, layer: int) -> float:
    norms = [_element(design, side) * math.sqrt(design.head_dim) for side in ("query", "key")]
    longest = 1.0 if design.qk_norm else float(theory.row_spread(design.head_dim, 1 - 0.5 / design.seq_len))
    return design.scale_of(layer) * norms[0] * norms[1] * longest**2


def _largest(design: Design, layer: int, row_std: float, magnitude: float) -> float:
    # What tokens have in common moves a row's scores alike: no spread within it, but larger scores.
    over_rows = row_std / math.sqrt(1.0 - design.correlation)
    largest = min(float(theory.expected_max_logit(over_rows, 2.0 * design.keys(layer) ** 2)), magnitude)
    return largest if design.softcap is None else min(largest, design.softcap)


def scores(
    design: Design, layer: int, name: str, std: float, row_std: float, magnitude: float, source: str
) -> Scores:
    keys = design.keys(layer)
    top = float(theory.expected_max_logit(std, keys))
    largest = _largest(design, layer, row_std, magnitude)
    sides = [
        _element(design, side) * (math.sqrt(design.seq_len) + math.sqrt(design.head_dim))
        for side in ("query", "key")
    ]
    return Scores(
        layer=name,
        keys=keys,
        score_std=std,
        row_std=row_std,
        sigma_ratio=row_std / float(theory.critical_std(keys)),
        expected_logit_max=top,
        max_abs_logit=largest,
        magnitude=magnitude,
        normalized_entropy=float(theory.expected_entropy(std, keys)) / math.log(keys) if keys > 1 else 1.0,
        log2_curvature=float(theory.hnf_curvature_bound(*sides, design.head_dim, largest)),
        source=source,
    )


def _element(design: Design, side: str) -> float:
    """Root mean square element of q or k: its Gaussian matrix has spectral norm near element (sqrt N + sqrt D)."""
    if design.qk_norm:
        return 1.0
    return getattr(design, f"{side}_std") * math.sqrt(design.d_model)


def dtype_verdicts(design: Design, worst: Scores, tolerance: float) -> dict[str, dict[str, Any]]:
    """For q, k, v and the weights stored in each format: bits it has and needs, what overflows, and the status.

    overflows: steps that make the format unsafe. elsewhere: step -> the only kind of attention in which it
    overflows, which the status does not count.
    sound_bits, for q and k and for the weights, cannot fail; typical_bits usually suffice (`theory.required_bits`).
    error_bound: proved limit of flash attention's error in that format, over the spread of v from -1 to 1,
    with weights of 1 and less stored as they are (fp8 kernels scale them, and do better).
    """
    scores, value = _gaussian_row(worst.row_std, worst.keys)
    sound, typical = 1.0, 1.0
    for stored, limit, usual in (
        ("query_key", worst.magnitude, math.sqrt(2.0) * worst.row_std),
        ("weights", 1.0, 1.0),
    ):
        sound = max(sound, float(theory.required_bits(stored, limit, tolerance)))
        bits = theory.required_bits_of_row(stored, scores, usual, value, tolerance, typical=True)
        typical = max(typical, float(bits))
    verdicts = {}
    for name, form in theory.FORMATS.items():
        bound = theory.forward_error_bound_from_norms(
            worst.magnitude, 1.0, 2.0, design.head_dim, worst.keys, theory.flash(form)
        )
        paths = theory.overflow_paths(name, worst.max_abs_logit, design.scale, worst.keys)
        # Library kernels keep products and sums in fp32 and subtract the maximum; products stored
        # before scaling are the one step that eager attention of the common libraries does in `name`.
        stored = [p.name for p in paths if p.overflows and p.name.startswith("q.k") and form.bits > 4]
        enough = 0 if form.bits >= sound else 1 if form.bits >= typical else 2
        status = STATUSES[2 if stored else enough]
        verdicts[name] = {
            "status": status,
            "bits": form.bits,
            "sound_bits": sound,
            "typical_bits": typical,
            "error_bound": float(bound) / 2.0,
            "overflows": stored,
            "elsewhere": {p.name: p.where for p in paths if p.overflows and p.name not in stored},
        }
    return verdicts


def _gaussian_row(std: float, keys: int) -> tuple[np.ndarray, np.ndarray]:
    """A row whose scores are the quantiles of a Gaussian, (n,), n at most 4096, and independent values (n, 8)."""
    n = min(keys, 4096)
    levels = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    values = torch.randn(n, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (std * torch.special.ndtri(levels)).numpy(), values.numpy()


def verdict(ratio: float, max_abs_logit: float) -> str:
    """ "stable", "marginal" or "unstable" of a design's worst layer."""
    if ratio >= UNSTABLE_RATIO or max_abs_logit > threshold("deteriorating_logit"):
        return "unstable"
    return "stable" if ratio <= SAFE_RATIO else "marginal"
