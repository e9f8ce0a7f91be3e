"""One sample through a model: what its scores are, in place of what they were predicted to be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import theory
from ..diagnosis import AttentionDiagnosis
from ..engine import api
from ..instrumentation import Measurement
from ..monitoring.analyzer import AttentionAnalyzer
from ..statistics.fields import JUDGED_MIN_KEYS
from .capture import LatestScores

_SHARE = 0.99  # of rows, as in `theory.row_spread`


@dataclass(frozen=True)
class MeasuredLayer:
    """One layer's numbers of one sample, per query head (H,) fp64, over rows with at least 16 visible keys.

    keys: the most visible keys of any row.
    score_std: root mean square over the rows of the spread within a row, nats.
    sigma_ratio: spread of a row over the critical spread of its visible keys, 99th percentile of the rows.
    row_max: mean of a row's largest score minus its mean score, nats. max_abs_logit: largest |score| of any row, nats.
    magnitude: scale max|q| max|k|, nats; NaN where only the scores are known. normalized_entropy: mean over the rows.
    """

    layer: str
    keys: int
    score_std: Tensor = field(repr=False)
    sigma_ratio: Tensor = field(repr=False)
    row_max: Tensor = field(repr=False)
    max_abs_logit: Tensor = field(repr=False)
    magnitude: Tensor = field(repr=False)
    normalized_entropy: Tensor = field(repr=False)


def measure_sample(
    model: nn.Module, sample: Any
) -> tuple[list[MeasuredLayer], dict[str, str], AttentionDiagnosis]:
    """Run the sample once: its measured layers, layer -> reason for the others, and the diagnosis.

    Raises ValueError as `run_measured`.
    """
    layers: list[MeasuredLayer] = []
    reasons: dict[str, str] = {}
    latest = LatestScores()

    def read(measurement: Measurement) -> None:
        try:
            layers.append(_read(measurement, latest))
        except ValueError as error:
            reasons[measurement.layer] = str(error)

    with latest:
        diagnosis = run_measured(model, sample, read)
    return layers, reasons, diagnosis


def run_measured(model: nn.Module, sample: Any, read: Callable[[Measurement], None]) -> AttentionDiagnosis:
    """Run the sample once, in evaluation mode and without gradients; `read` gets every attention call of the run.

    sample: what the model takes; a mapping for keyword arguments.
    Raises ValueError if the model cannot run the sample, or if none of its attention can be measured.
    """
    training = [module for module in model.modules() if module.training]
    with AttentionAnalyzer(model, mode="probe") as analyzer:
        instrumentation = analyzer.instrumentation
        record = instrumentation.on_measure
        measured = 0

        def both(measurement: Measurement) -> None:
            nonlocal measured
            measured += 1
            read(measurement)
            if record is not None:
                record(measurement)

        instrumentation.on_measure, instrumentation.graphs = both, None
        model.eval()
        try:
            with torch.no_grad():
                model(**sample) if isinstance(sample, Mapping) else model(sample)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"the model cannot run the sample: {type(error).__name__}: {error}") from error
        finally:
            for module in training:
                module.training = True
        if not measured:
            raise ValueError(f"none of its attention can be measured: {instrumentation.coverage}")
        return analyzer.diagnose()


def _read(measurement: Measurement, latest: LatestScores) -> MeasuredLayer:
    query, key, options = measurement.query, measurement.key, measurement.options
    rows = measurement.rows
    batch, heads, num_rows = rows.lse.shape
    scores = latest.taken((batch, heads, num_rows), (batch * heads, num_rows))
    if query is None or key is None or options is None:
        std, mean_score = _spread_of_scores(measurement, scores)
        magnitude = torch.full(rows.lse.shape[1:2], torch.nan, dtype=torch.float64)
    else:
        rows = api.attend(query, key, None, options, extended=True)[1].detach()
        assert rows.score_std is not None and rows.score_mean is not None  # of `extended=True`
        std, mean_score = rows.score_std, rows.score_mean
        lengths = [x.float().norm(dim=-1).amax((0, 2)).double().cpu() for x in (query, key)]
        group = lengths[0].numel() // lengths[1].numel()
        magnitude = abs(options.scale) * lengths[0] * lengths[1].repeat_interleave(group)
    visible = measurement.visible_keys.expand(rows.lse.shape)
    least = min(JUDGED_MIN_KEYS, int(visible.max())) if visible.numel() else 1
    judged = (visible >= max(least, 2)) & rows.lse.isfinite()
    critical = torch.from_numpy(theory.critical_std(visible.clamp(min=2).cpu().numpy()))
    std = std.double().cpu()
    judged, visible = judged.cpu(), visible.cpu()

    def mean(values: Tensor) -> Tensor:
        count = judged.sum((0, 2)).clamp(min=1)
        return torch.where(judged, values.double().cpu(), 0.0).sum((0, 2)) / count

    ratios = torch.where(judged, std / critical, torch.nan).transpose(0, 1).flatten(1)
    largest = torch.maximum(rows.max_logit.abs(), rows.min_logit.abs()).double().cpu()
    seen = rows.max_logit.isfinite().cpu()
    return MeasuredLayer(
        layer=measurement.layer,
        keys=int(visible.max()),
        score_std=mean(std.square()).sqrt(),
        sigma_ratio=torch.nanquantile(ratios, _SHARE, dim=1),
        row_max=mean(rows.max_logit - mean_score),
        max_abs_logit=torch.where(seen, largest, 0.0).amax((0, 2)),
        magnitude=magnitude,
        normalized_entropy=mean(rows.entropy.double().cpu() / visible.clamp(min=2).double().log()),
    )


def _spread_of_scores(measurement: Measurement, scores: Tensor | None) -> tuple[Tensor, Tensor]:
    """Spread and mean of every row, (B, H, M) fp64, of the scores of an attention that was caught at its softmax.

    scores: (B, H, M, N) or (B * H, M, N). Hidden keys have the lowest scores.
    Raises ValueError for scores of another layout.
    """
    if scores is None or measurement.sample_period != 1:
        raise ValueError("only its scores are known, not the queries and keys")
    batch, heads, num_rows = measurement.rows.lse.shape
    ranked = scores.detach().double().reshape(batch, heads, num_rows, -1).sort(-1, descending=True).values
    count = measurement.visible_keys.to(ranked.device).expand(batch, heads, num_rows)[..., None]
    seen = torch.arange(ranked.shape[-1], device=ranked.device) < count
    mean = torch.where(seen, ranked, 0.0).sum(-1, keepdim=True) / count.clamp(min=1)
    square = torch.where(seen, ranked - mean, 0.0).square().sum(-1) / count[..., 0].clamp(min=1)
    return square.sqrt(), mean[..., 0].to(measurement.rows.max_logit.device)
