"""What the demo leaves in its output folder: figures and one JSON document."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes

from ... import figures
from ...diagnosis import AttentionDiagnosis
from ...diagnosis.thresholds import threshold
from ...figures.canvas import axes_for, dress
from ...figures.canvas import save as save_figure
from ...versions import versions
from .loss import FINAL_WINDOW
from .outcome import Outcome
from .training import Config, Run

SCHEMA_VERSION = 1
_UNTREATED, _TREATED = "#c0392b", "#2471a3"
_PUBLISHED_LIMITS = {  # threshold of the diagnosis -> what happens at twice that range
    "clip_logit": "QK-clip acts (Kimi K2)",
    "deteriorating_logit": "loss suffers (Wortsman et al.)",
    "diverged_logit": "published runs diverged",
}


def save(
    folder: Path, document: dict[str, Any], untreated: Run, treated: Run, outcome: Outcome
) -> list[Path]:
    """Write the figures and the document of `to_document` into the folder; returns the paths. Raises OSError."""
    drawn = {"losses": loss_curves(untreated, treated, outcome)}
    limits = {text: 2.0 * threshold(name) for name, text in _PUBLISHED_LIMITS.items()}
    for name, run in (("untreated", untreated), ("treated", treated)):
        drawn[f"{name}_entropy"] = figures.entropy_heatmap(run.history[-1], threshold("sink_mass"))
        drawn[f"{name}_score_range"] = figures.score_range_evolution(run.history, limits)
        drawn[f"{name}_curvature"] = figures.curvature_evolution(run.history)
    paths = []
    for name, axes in drawn.items():
        paths.append(folder / f"{name}.png")
        save_figure(axes, paths[-1])
    paths.append(folder / "diagnosis.json")
    paths[-1].write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return paths


def to_document(config: Config, untreated: Run, treated: Run, outcome: Outcome) -> dict[str, Any]:
    """The demo as JSON types: what ran, what was found, what came of it."""
    return {
        "schema_version": SCHEMA_VERSION,
        "versions": versions("hnf-attention", "torch"),
        "config": asdict(config),
        "outcome": outcome.to_dict(),
        "untreated": _run(untreated),
        "treated": _run(treated),
    }


def loss_curves(untreated: Run, treated: Run, outcome: Outcome) -> Axes:
    """Both losses over the steps; the warning, the alarm and the first sign in the loss are marked."""
    axes = axes_for(None, 7.6, 4.2)
    for run, colour, label in ((untreated, _UNTREATED, "untreated"), (treated, _TREATED, "treated")):
        steps = range(1, len(run.losses) + 1)
        axes.plot(steps, run.losses, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smoothed(run.losses), color=colour, linewidth=1.8, label=label)
    marks = [(outcome.warning_step, "warning"), (outcome.alarm_step, "alarm")]
    if outcome.sign is not None:
        marks.append((outcome.sign.step, f"the loss shows it ({outcome.sign.kind})"))
    for place, (step, text) in enumerate(marks):
        if step is not None:
            axes.axvline(step, color="#555555", linewidth=0.9, linestyle="--")
            left = step > 0.6 * len(untreated.losses)  # there is no room for the text at the right
            axes.annotate(
                f"{text}, step {step}",
                (step, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(-3 if left else 3, -4 - 12 * place),
                textcoords="offset points",
                ha="right" if left else "left",
                va="top",
                fontsize=8,
                bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5},
            )
    # The first steps fall from 5.5 nats. On their scale the rest would look flat.
    later = [loss for run in (untreated, treated) for loss in _smoothed(run.losses)[FINAL_WINDOW:]]
    finite = [loss for loss in later if math.isfinite(loss)]
    if finite:
        axes.set_ylim(min(finite) - 0.2, max(finite) + 0.4)
    dress(axes, "training step", "loss (nats per byte)", "The same run, untreated and treated")
    axes.legend(fontsize=8)
    return axes


def _smoothed(losses: Sequence[float], window: int = 10) -> list[float]:
    """Trailing mean over `window` steps, fewer at the start."""
    return [fmean(losses[max(0, end - window) : end]) for end in range(1, len(losses) + 1)]


def _run(run: Run) -> dict[str, Any]:
    return {
        "losses": [loss if math.isfinite(loss) else None for loss in run.losses],
        "held_out_loss": run.held_out_loss if math.isfinite(run.held_out_loss) else None,
        "first_issue": _diagnosis(run.first_issue),
        "first_error": _diagnosis(run.first_error),
        "last_diagnosis": _diagnosis(run.last_diagnosis),
        "interventions": [{"step": step, **intervention} for step, intervention in run.interventions],
    }


def _diagnosis(diagnosis: AttentionDiagnosis | None) -> dict[str, Any] | None:
    return None if diagnosis is None else diagnosis.to_dict()
