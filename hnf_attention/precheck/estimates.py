"""Scores of a built model's layers, from its weights or from one measured sample, in place of predicted ones."""

from __future__ import annotations

import math
from dataclasses import replace

from .. import theory
from . import predict
from .checkpoint import LayerWeights
from .design import Design
from .measured import MeasuredLayer
from .predict import Scores

_BITS_A_NAT = 2.0 / math.log(2.0)  # bits of curvature that a nat of the largest score costs


def from_weights(design: Design, weights: list[LayerWeights]) -> list[Scores]:
    """The scores of each layer: those of its median head, but the largest |score| and magnitude of any head."""
    found = []
    for index, layer in enumerate(weights):
        place = min(index, design.n_layers - 1)
        alone = math.sqrt(1.0 - design.correlation)  # the share that tokens do not have in common
        std = predict.capped_std(float(layer.std.median()) * alone, design.softcap)
        factor = 1.0 if design.qk_norm else float(theory.row_spread(design.head_dim))
        magnitude = float(layer.magnitude.max())
        scores = predict.scores(
            design, place, layer.layer, std, std * factor, magnitude, "predicted: weights"
        )
        worst = float(layer.std.max()) * factor
        largest = float(theory.expected_max_logit(worst, 2.0 * scores.keys**2))
        found.append(replace(scores, max_abs_logit=min(largest, float(layer.bound.max()))))
    return found


def from_measurement(design: Design, measured: list[MeasuredLayer]) -> list[Scores]:
    """The scores of each measured layer: those of its median head, but the largest scores of any head."""
    found = []
    for index, layer in enumerate(measured):
        place = min(index, design.n_layers - 1)
        std, ratio = float(layer.score_std.median()), float(layer.sigma_ratio.median())
        keys = min(layer.keys, design.keys(place))
        row_std = ratio * float(theory.critical_std(keys)) if keys > 1 else 0.0
        local = replace(design, seq_len=layer.keys)
        magnitude = float(layer.magnitude.max())
        if math.isnan(magnitude):  # only the scores are known
            magnitude = max(float(layer.max_abs_logit.max()), predict.predict_layer(local, place).magnitude)
        scores = predict.scores(local, place, layer.layer, std, row_std, magnitude, "measured")
        largest = float(layer.max_abs_logit.max())
        found.append(
            replace(
                scores,
                sigma_ratio=ratio,
                expected_logit_max=float(layer.row_max.max()),
                max_abs_logit=largest,
                normalized_entropy=float(layer.normalized_entropy.median()),
                log2_curvature=scores.log2_curvature + _BITS_A_NAT * (largest - scores.max_abs_logit),
            )
        )
    return found
