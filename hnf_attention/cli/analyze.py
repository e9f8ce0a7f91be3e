"""`hnf-attention analyze`: judge the attention of a Hugging Face language model on a text."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.text import Text

from ..diagnosis import AttentionDiagnosis
from ..diagnosis.extent import counted
from ..errors import InputError
from ..names import display_name
from ..report.tables import issue_list, layer_table
from .analysis import analyze
from .devices import device_of
from .exit_codes import FOUND, HEALTHY
from .loading import Loading
from .output import check_targets, for_people, make_folder, write_document
from .progress import shown_progress
from .thresholds import read_thresholds


def run(options: argparse.Namespace) -> int:
    check_targets({"--json": options.json}, [options.text])
    thresholds = read_thresholds(options.threshold)
    loading = loading_of(options)
    if options.figures is not None:
        make_folder(options.figures)
    with shown_progress() as show:
        analysis = analyze(
            options.model,
            options.text,
            revision=options.revision,
            loading=loading,
            window=options.window,
            batch_size=options.batch_size,
            max_windows=options.max_windows,
            thresholds=thresholds,
            progress=show,
        )
    diagnosis = analysis.diagnosis
    screen = for_people(options.json)
    title = (
        f"{analysis.place} ({analysis.model_class}, {analysis.dtype}): "
        f"{analysis.windows} windows of {analysis.window} tokens of {analysis.text}"
    )
    screen.print(layer_table(diagnosis.stats, diagnosis.issues, title))
    screen.print(issue_list(diagnosis.issues))
    failing = diagnosis.errors + (diagnosis.warnings if options.fail_on == "warning" else [])
    verdict = "not healthy" if failing else diagnosis.verdict
    found = [("error", diagnosis.errors), ("warning", diagnosis.warnings), ("note", diagnosis.notes)]
    counts = ", ".join(counted(len(issues), severity) for severity, issues in found)
    screen.print(Text(f"\n{verdict}: {counts}; {diagnosis.extent}", style="bold"))
    for layer, why in analysis.coverage.not_measured.items():
        screen.print(Text(f"not measured: {display_name(layer)}: {why}", style="yellow"))
    if options.figures is not None:
        for path in _draw(diagnosis, options.figures):
            screen.print(Text(f"figure: {path}"))
    write_document(options.json, analysis.to_dict())
    return FOUND if failing else HEALTHY


def loading_of(options: argparse.Namespace) -> Loading:
    """How the options say that the model is loaded. Raises InputError for a device that there is not."""
    if options.device is not None and options.device_map is not None:
        raise InputError("expected one of --device and --device-map, got both")
    return Loading(
        dtype=options.dtype if options.dtype == "auto" else getattr(torch, options.dtype),
        attn_implementation=options.attn_implementation,
        device=device_of(options.device or "cpu"),
        device_map=options.device_map,
    )


def _draw(diagnosis: AttentionDiagnosis, folder: Path) -> list[Path]:
    paths = [folder / "entropy.png", folder / "curvature.png"]
    try:
        diagnosis.plot_entropy_heatmap(paths[0])
        diagnosis.plot_curvature_evolution(paths[1])
    except OSError as error:
        raise InputError(f"cannot write figures to {folder}: {error.strerror}") from error
    return paths
