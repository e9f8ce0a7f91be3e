"""Will this attention be stable, in this precision, at this length? Before training, from what there is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor, nn

from .. import theory
from ..diagnosis.thresholds import threshold
from ..names import display_name
from . import predict
from .advice import Neighbour, margins, neighbours, sentence
from .checkpoint import LayerWeights, read_weights
from .design import Design, read_design
from .measured import MeasuredLayer, measure_sample
from .predict import SAFE_RATIO, Scores
from .random_tokens import random_token_maxima
from .report import VERDICTS, StabilityReport


def check_attention_stability(
    model: nn.Module | None = None,
    sample_input: Any = None,
    config: Any = None,
    *,
    seq_len: int | None = None,
    dtype: object = None,
    tolerance: float = theory.TOLERANCE,
) -> StabilityReport:
    """Check attention before training; a `StabilityReport`, a dict with the keys its class tells.

    config: a Hugging Face configuration, a mapping, or any object with such attributes (`read_design`); None
        takes `model.config`. Alone it gives predictions for random weights.
    model: its weights give each head's expected spread and the largest score that any input can give; without a
        sample it runs once on a few short sequences of random tokens, for the largest score to expect of each head.
    sample_input: token ids (B, N) or whatever the model takes, a mapping for keyword arguments: run once,
        measured, compared with the prediction. Without a model, its second dimension is the length.
    seq_len: visible keys; else the sample's, else the configuration's. dtype: of q, k, v; else the model's.
    tolerance: error of an output, over the spread of its values, that rounding may cause.

    Measured beats read from weights beats predicted beats assumed; `sources` says which each number is.
    Raises ValueError for a configuration without a needed field, with the names tried, for sizes that make
    no attention, an unknown dtype, a tolerance outside (0, 1), or a model without attention; TypeError for a model
    that is no module.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module or None, got {type(model).__name__}")
    if not 0 < tolerance < 1:
        raise ValueError(f"expected tolerance between 0 and 1, got {tolerance!r}")
    if config is None:
        config = getattr(model, "config", None)
    if dtype is None and model is not None:
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    design = read_design(config, seq_len=seq_len or _length(sample_input), dtype=dtype)
    notes: list[str] = []
    found = [predict.predict_layer(design, layer) for layer in range(design.n_layers)]
    predicted = found
    weights, typical, measured, diagnosis = [], {}, [], None
    if model is not None:
        weights, reasons = _weights(model, design, notes)
        notes += [f"weights of {display_name(name)} not read: {why}" for name, why in reasons.items()]
        found = _from_weights(design, weights) or found
        if sample_input is not None and _has_numbers(model):
            try:
                measured, diagnosis = measure_sample(model, sample_input)
            except ValueError as error:
                notes.append(f"not measured: {error}")
            found = _from_measurement(design, measured) or found
        if weights and not measured:
            try:
                typical = random_token_maxima(model, design.seq_len)
            except Exception as error:  # nobody asked for this run: whatever stops it is told, no more
                notes.append(f"not run on random tokens: {type(error).__name__}: {error}")
    return _report(design, predicted, found, weights, typical, measured, diagnosis, tolerance, notes)


def _length(sample: Any) -> int | None:
    if isinstance(sample, Mapping):
        sample = next((x for x in sample.values() if isinstance(x, Tensor) and x.dim() >= 2), None)
    shape = getattr(sample, "shape", None)
    if shape is None:
        return None
    if len(shape) < 2 or not shape[1]:
        raise ValueError(f"expected sample_input of shape (batch, length, ...), got {tuple(shape)}")
    return int(shape[1])


def _has_numbers(model: nn.Module) -> bool:
    return not any(p.is_meta for p in model.parameters())


def _weights(model: nn.Module, design: Design, notes: list[str]) -> tuple[list[LayerWeights], dict[str, str]]:
    if not _has_numbers(model):
        notes.append("the model is on the meta device: its weights say nothing")
        return [], {}
    return read_weights(model, design)


def _from_weights(design: Design, weights: list[LayerWeights]) -> list[Scores]:
    """Scores of each layer, its median head for what it usually does, its largest for bounds."""
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


def _from_measurement(design: Design, measured: list[MeasuredLayer]) -> list[Scores]:
    found = []
    for index, layer in enumerate(measured):
        place = min(index, design.n_layers - 1)
        std, ratio = float(layer.score_std.median()), float(layer.sigma_ratio.median())
        keys = min(layer.keys, design.keys(place))
        row_std = ratio * float(theory.critical_std(keys)) if keys > 1 else 0.0
        magnitude = float(layer.magnitude.max())
        local = replace(design, seq_len=layer.keys)
        scores = predict.scores(local, place, layer.layer, std, row_std, magnitude, "measured")
        largest = float(layer.max_abs_logit.max())
        exponent = 2.0 / math.log(2.0) * (largest - scores.max_abs_logit)
        found.append(
            replace(
                scores,
                sigma_ratio=ratio,
                expected_logit_max=float(layer.row_max.max()),
                max_abs_logit=largest,
                normalized_entropy=float(layer.normalized_entropy.median()),
                log2_curvature=scores.log2_curvature + exponent,
            )
        )
    return found


def _report(
    design: Design,
    predicted: list[Scores],
    found: list[Scores],
    weights: list[LayerWeights],
    typical: dict[str, Tensor],
    measured: list[MeasuredLayer],
    diagnosis: Any,
    tolerance: float,
    notes: list[str],
) -> StabilityReport:
    worst = max(found, key=lambda scores: scores.sigma_ratio)
    ratio, largest = worst.sigma_ratio, max(scores.max_abs_logit for scores in found)
    log2_curvature = max(scores.log2_curvature for scores in found)
    # Bits and bounds for the layer with the largest scores, which need not be the least stable one.
    heaviest = max(found, key=lambda scores: scores.magnitude)
    heaviest = replace(heaviest, row_std=max(s.row_std for s in found), max_abs_logit=largest)
    dtypes = predict.dtype_verdicts(design, heaviest, tolerance)
    verdict = predict.verdict(ratio, largest)
    trained = bool(weights) and not _as_initialised(predicted, found)
    if diagnosis is not None:
        level = 2 if diagnosis.errors else 1 if diagnosis.warnings else 0
        # Trained heads are sharp by design, beyond any spread that random ones should have.
        by_spread = VERDICTS.index(verdict)
        by_spread = min(by_spread, 1) if trained and largest < threshold("deteriorating_logit") else by_spread
        verdict = VERDICTS[max(level, by_spread)]
    near = neighbours(design, ratio, largest, trained=trained)
    half = dtypes["float16"]
    report = StabilityReport(
        expected_logit_max=max(scores.expected_logit_max for scores in found),
        curvature_bound=2.0**log2_curvature if log2_curvature < 1024 else float("inf"),
        log2_curvature_bound=log2_curvature,
        precision_bits_needed=half["sound_bits"],
        typical_bits_needed=half["typical_bits"],
        float16_safe=half["status"] != "unsafe",
        recommendations=[],
        verdict=verdict,
        sigma_ratio=ratio,
        margin=SAFE_RATIO / ratio if ratio > 0 else float("inf"),
        max_abs_logit=largest,
        tolerance=tolerance,
        layers=_table(predicted, found, weights, typical, measured),
        dtypes=dtypes,
        margins=margins(design, ratio),
        neighbours=[neighbour.to_dict() for neighbour in near],
        issues=[] if diagnosis is None else [asdict(issue) for issue in diagnosis.issues],
        design={key: value for key, value in asdict(design).items() if key != "sources"},
        notes=notes,
    )
    if weights:
        report["weight_logit_bound"] = max(float(layer.bound.max()) for layer in weights)
    if typical:
        report["weight_logit_typical"] = max(float(heads.max()) for heads in typical.values())
    report["sources"] = _sources(design, worst, bool(weights), bool(typical))
    report["recommendations"] = _recommendations(design, report, worst, near, diagnosis)
    return report


def _as_initialised(predicted: list[Scores], found: list[Scores]) -> bool:
    """Whether most layers' scores spread as those of random weights do."""
    pairs = list(zip(predicted, found, strict=False))
    alike = [abs(was.score_std - now.score_std) <= 0.3 * was.score_std for was, now in pairs]
    return 2 * sum(alike) >= len(alike)


def _table(
    predicted: list[Scores],
    found: list[Scores],
    weights: list[LayerWeights],
    typical: dict[str, Tensor],
    measured: list[MeasuredLayer],
) -> list[dict[str, Any]]:
    bounds = {layer.layer: layer for layer in weights}
    rows = []
    for index, scores in enumerate(found):
        row = scores.to_dict()
        layer = bounds.get(scores.layer)
        if layer is not None:
            row["weight_logit_bound"] = float(layer.bound.max())
            row["weight_logit_bounds"] = layer.bound.tolist()
        if scores.layer in typical:
            row["weight_logit_typical"] = float(typical[scores.layer].max())
            row["weight_logit_typicals"] = typical[scores.layer].tolist()
        if measured or weights:
            row["predicted_score_std"] = predicted[min(index, len(predicted) - 1)].score_std
        rows.append(row)
    return rows


def _sources(design: Design, worst: Scores, weights: bool, typical: bool) -> dict[str, str]:
    names = ("sigma_ratio", "expected_logit_max", "max_abs_logit", "log2_curvature_bound", "curvature_bound")
    sources = dict.fromkeys((*names, "precision_bits_needed", "dtypes"), worst.source)
    if weights:
        sources["weight_logit_bound"] = "proved: weights, any input"
    if typical:
        sources["weight_logit_typical"] = "measured: random tokens"
    return sources | {f"design.{name}": source for name, source in design.sources.items()}


def _recommendations(
    design: Design, report: StabilityReport, worst: Scores, near: list[Neighbour], diagnosis: Any
) -> list[str]:
    texts = []
    if worst.sigma_ratio > SAFE_RATIO:
        texts.append(sentence(design, worst.sigma_ratio, worst.keys))
        texts += map(str, near)
    for issue in [] if diagnosis is None else diagnosis.errors[:3]:
        texts.append(f"{issue.evidence} -> {issue.suggestion}")
    for name in dict.fromkeys((design.dtype, "float16")):
        found = report["dtypes"][name]
        if found["status"] == "unsafe":
            fit = [other for other, x in report["dtypes"].items() if x["status"] != "unsafe"]
            texts.append(
                f"{name} has {found['bits']} significand bits where {found['typical_bits']:.0f} are usual and "
                f"{found['sound_bits']:.0f} certain for errors of {report['tolerance']:g}: store q, k and the weights "
                f"in {' or '.join(fit[:3]) or 'no format known'}"
                + (f"; overflows: {', '.join(found['overflows'])}" if found["overflows"] else "")
            )
    for step in report["dtypes"][design.dtype]["overflows"]:
        texts.append(f"{step} overflows: scale q before the product, or use a fused kernel")
    return texts
