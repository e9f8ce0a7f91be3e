"""From the evidence about a design's layers to the report: numbers, verdict, sources and recommendations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from ..diagnosis import AttentionDiagnosis
from ..diagnosis.thresholds import threshold
from . import predict, rates
from .advice import Neighbour, explanation, margins, neighbours
from .checkpoint import LayerWeights
from .design import Design
from .formats import SAFE, UNSAFE, USUALLY_SAFE, format_verdicts
from .measured import MeasuredLayer
from .predict import MARGINAL, NOT_KNOWN, SAFE_RATIO, STABLE, UNSTABLE, VERDICTS, Scores
from .report import StabilityReport

_PLAIN = "not known: numbers of plain attention"
_ALIKE = 0.3  # relative difference up to which a spread counts as that of random weights


@dataclass
class Evidence:
    """What is known about the layers.

    predicted: scores at initialisation. found: the best known scores (measured, else from weights, else predicted).
    typical: layer -> the largest |score| of each head on random tokens, (H,).
    unknown: why predicted scores, and those from weights, may be wrong by any factor; None if they hold.
    """

    predicted: list[Scores]
    found: list[Scores] = field(default_factory=list)
    weights: list[LayerWeights] = field(default_factory=list)
    typical: dict[str, Tensor] = field(default_factory=dict)
    measured: list[MeasuredLayer] = field(default_factory=list)
    diagnosis: AttentionDiagnosis | None = None
    notes: list[str] = field(default_factory=list)
    unknown: str | None = None

    def __post_init__(self) -> None:
        self.found = self.found or self.predicted

    @property
    def known(self) -> bool:
        """Whether the best known scores hold."""
        return self.unknown is None or bool(self.measured)

    @property
    def trained(self) -> bool:
        """Whether the weights are known, and the scores of most layers spread unlike those of random weights."""
        pairs = list(zip(self.predicted, self.found, strict=False))
        alike = [abs(was.score_std - now.score_std) <= _ALIKE * was.score_std for was, now in pairs]
        return bool(self.weights) and 2 * sum(alike) < len(alike)


def summarise(
    design: Design, evidence: Evidence, tolerance: float, plan: rates.TrainingPlan | None = None
) -> StabilityReport:
    """The report of `check_attention_stability`."""
    plan = plan or rates.TrainingPlan()
    if not evidence.known:
        evidence.found = [replace(scores, source=_PLAIN) for scores in evidence.found]
    found = evidence.found
    worst = max(found, key=lambda scores: scores.sigma_ratio)
    ratio, largest = worst.sigma_ratio, max(scores.max_abs_logit for scores in found)
    log2_curvature = max(scores.log2_curvature for scores in found)
    # Bits and bounds are for the layer with the largest scores, which need not be the least stable one.
    heaviest = max(found, key=lambda scores: scores.magnitude)
    heaviest = replace(heaviest, row_std=max(s.row_std for s in found), max_abs_logit=largest)
    known = evidence.known
    # Without queries and keys, what rounding them costs rests on the prediction.
    norms_known = evidence.unknown is None or (
        bool(evidence.measured) and all(not layer.magnitude.isnan().any() for layer in evidence.measured)
    )
    if not norms_known:
        what = "number formats are not judged" if known else "not known"
        evidence.notes.insert(0, f"{what}: {evidence.unknown}")
    formats = format_verdicts(design, heaviest, tolerance, known=norms_known)
    near = neighbours(design, ratio, largest, trained=evidence.trained, plan=plan) if known else []
    half = formats["float16"]
    without_rate = _verdict(evidence, ratio, largest)
    harm = None if without_rate == NOT_KNOWN else rates.counted_harm(design, plan)
    report = StabilityReport(
        expected_logit_max=max(scores.expected_logit_max for scores in found),
        curvature_bound=2.0**log2_curvature if log2_curvature < 1024 else math.inf,
        log2_curvature_bound=log2_curvature,
        precision_bits_needed=half["sound_bits"],
        typical_bits_needed=half["typical_bits"],
        float16_safe=half["status"] in (SAFE, USUALLY_SAFE) if norms_known else None,
        recommendations=_recommendations(
            design, worst, near, evidence, formats, tolerance, _rate_advice(design, plan, harm)
        ),
        verdict=without_rate if harm is None else max(without_rate, rates.verdict(harm), key=VERDICTS.index),
        rate_verdict=None if harm is None else rates.verdict(harm),
        sigma_ratio=ratio,
        margin=SAFE_RATIO / ratio if ratio > 0 else math.inf,
        max_abs_logit=largest,
        tolerance=tolerance,
        layers=_layers(evidence),
        dtypes=formats,
        margins=margins(design, ratio) if known else {},
        neighbours=[neighbour.to_dict() for neighbour in near],
        issues=[] if evidence.diagnosis is None else [asdict(issue) for issue in evidence.diagnosis.issues],
        design={key: value for key, value in asdict(design).items() if key != "sources"},
        notes=evidence.notes,
        sources=_sources(design, worst, evidence),
    )
    _add_rate(report, design, plan)
    if evidence.weights:
        report["weight_logit_bound"] = max(float(layer.bound.max()) for layer in evidence.weights)
    if evidence.typical:
        report["weight_logit_typical"] = max(float(heads.max()) for heads in evidence.typical.values())
    return report


def _add_rate(report: StabilityReport, design: Design, plan: rates.TrainingPlan) -> None:
    """Add what the learning rate does, as far as it is known."""
    report |= {"learning_rate": plan.learning_rate, "warmup": plan.warmup}
    report["largest_clean_rate"] = report["harm_probability"] = None
    if report["verdict"] == NOT_KNOWN:
        return
    report["largest_clean_rate"] = rates.largest_clean_rate(design, plan.warmup)
    report["sources"]["largest_clean_rate"] = rates.SOURCE
    if plan.learning_rate is None:
        return
    report["harm_probability"] = rates.harm_probability(design, plan.learning_rate, plan.warmup)
    if design.d_model > rates.WIDEST:
        report["notes"].append(
            f"the verdict leaves the learning rate out: what is known of rates comes from much narrower models than "
            f"{design.d_model}"
        )


def _rate_advice(design: Design, plan: rates.TrainingPlan, harm: float | None) -> str:
    """What to do about the learning rate; "" if it is clean or not counted. harm: how often it harmed such runs."""
    largest = rates.largest_clean_rate(design, plan.warmup)
    if harm is None or largest is None or rates.verdict(harm) == STABLE:
        return ""
    return (
        f"at a learning rate of {plan.learning_rate:g} with {plan.warmup} steps of warmup, attention harmed {harm:.0%} "
        f"of such runs: train at {rates.printed(largest)} or less, or normalise queries and keys (QK-norm)"
    )


def _verdict(evidence: Evidence, ratio: float, largest: float) -> str:
    by_spread = predict.verdict(ratio, largest)
    errors, warnings = [], []
    if evidence.diagnosis is not None:
        errors, warnings = evidence.diagnosis.errors, evidence.diagnosis.warnings
    measured = UNSTABLE if errors else MARGINAL if warnings else STABLE
    if not evidence.known:
        return NOT_KNOWN if measured == STABLE else measured
    # Trained heads are sharp by design, beyond the spread that is stable for random weights.
    sharp = by_spread == UNSTABLE and largest < threshold("deteriorating_logit")
    if evidence.diagnosis is not None and evidence.trained and sharp:
        by_spread = MARGINAL
    return max(by_spread, measured, key=VERDICTS.index)


def _layers(evidence: Evidence) -> list[dict[str, Any]]:
    bounds = {layer.layer: layer for layer in evidence.weights}
    rows = []
    for index, scores in enumerate(evidence.found):
        row = scores.to_dict()
        layer, typical = bounds.get(scores.layer), evidence.typical.get(scores.layer)
        if layer is not None:
            row["weight_logit_bound"] = float(layer.bound.max())
            row["weight_logit_bounds"] = layer.bound.tolist()
        if typical is not None:
            row["weight_logit_typical"] = float(typical.max())
            row["weight_logit_typicals"] = typical.tolist()
        if evidence.measured or evidence.weights:
            predicted = evidence.predicted[min(index, len(evidence.predicted) - 1)]
            row["predicted_score_std"] = predicted.score_std
        rows.append(row)
    return rows


def _sources(design: Design, worst: Scores, evidence: Evidence) -> dict[str, str]:
    names = ("sigma_ratio", "expected_logit_max", "max_abs_logit", "log2_curvature_bound", "curvature_bound")
    sources = dict.fromkeys((*names, "precision_bits_needed", "dtypes"), worst.source)
    if evidence.weights:
        sources["weight_logit_bound"] = "proved: weights, any input"
    if evidence.typical:
        sources["weight_logit_typical"] = "measured: random tokens"
    return sources | {f"design.{name}": source for name, source in design.sources.items()}


def _recommendations(
    design: Design,
    worst: Scores,
    near: Sequence[Neighbour],
    evidence: Evidence,
    formats: dict[str, dict[str, Any]],
    tolerance: float,
    rate_advice: str,
) -> list[str]:
    texts = []
    if evidence.known and worst.sigma_ratio > SAFE_RATIO:
        texts.append(explanation(design, worst.sigma_ratio, worst.keys))
    if rate_advice:
        texts.append(rate_advice)
    if texts:
        texts += map(str, near)
    for issue in [] if evidence.diagnosis is None else evidence.diagnosis.errors[:3]:
        texts.append(f"{issue.evidence} -> {issue.suggestion}")
    if not evidence.known:
        return [
            *texts,
            "the scores of this configuration are not known: give a model and a sample that measures them",
        ]
    for name in dict.fromkeys((design.dtype, "float16")):
        found = formats[name]
        if found["status"] == UNSAFE:
            fit = [other for other, x in formats.items() if x["status"] in (SAFE, USUALLY_SAFE)]
            texts.append(
                f"{name} has {found['bits']} significand bits. An error of {tolerance:g} of the values' spread "
                f"usually takes {found['typical_bits']:.0f} bits, and {found['sound_bits']:.0f} bits are proved to "
                f"suffice. Store q, k and the weights in {' or '.join(fit[:3]) or 'a wider format than any known'}"
                + (f". Overflows: {', '.join(found['overflows'])}" if found["overflows"] else "")
            )
    for step in formats[design.dtype]["overflows"]:
        texts.append(f"{step} overflows: scale q before the product, or use a fused kernel")
    return texts
