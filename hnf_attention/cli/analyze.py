"""`hnf-attention analyze`: judge the attention of a Hugging Face language model on a text."""

from __future__ import annotations

import argparse

from rich.progress import Progress
from rich.text import Text

from ..names import display_name
from ..report.tables import issue_list, layer_table
from .analysis import analyze
from .exit_codes import FOUND, HEALTHY
from .output import check_target, for_people, write_document


def run(options: argparse.Namespace) -> int:
    check_target(options.json, "--json")
    console = for_people(options.json)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("windows", total=None)
        analysis = analyze(
            options.model,
            options.text,
            window=options.window,
            batch_size=options.batch_size,
            max_windows=options.max_windows,
            device=options.device,
            dtype=options.dtype,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    diagnosis = analysis.diagnosis
    title = (
        f"{analysis.model} ({analysis.model_class}, {analysis.dtype}): "
        f"{analysis.windows} windows of {analysis.window} tokens of {analysis.text}"
    )
    console.print(layer_table(diagnosis.stats, diagnosis.issues, title))
    console.print(issue_list(diagnosis.issues))
    counts = (
        f"{len(diagnosis.errors)} errors, {len(diagnosis.warnings)} warnings, {len(diagnosis.notes)} notes"
    )
    console.print(Text(f"\n{diagnosis.verdict}: {counts}; {diagnosis.extent}", style="bold"))
    for layer, why in analysis.coverage.not_measured.items():
        console.print(Text(f"not measured: {display_name(layer)}: {why}", style="yellow"))
    write_document(options.json, analysis.to_dict())
    return FOUND if diagnosis.errors else HEALTHY
