"""`hnf-attention report`: a run log, or two, as one HTML file."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from rich.text import Text

from ..errors import InputError
from ..report import html
from .exit_codes import FOUND, HEALTHY
from .output import check_target, for_people, write_document
from .progress import shown_progress
from .run_logs import open_log

SCHEMA_VERSION = 1

_STYLES = {"failed": "bold red", "at risk": "bold yellow", "recovered": "green", "healthy": "green"}
_FINE = ("healthy", "recovered")


def run(options: argparse.Namespace) -> int:
    """Write the page and print the verdicts."""
    if options.out.exists() and any(_same(options.out, path) for path in options.runs):
        raise InputError(f"expected --out to be another file than the run log, got {options.out}")
    check_target(str(options.out), "--out")
    check_target(options.json, "--json")
    if len(options.runs) > 2:
        raise InputError(f"expected one or two run logs, got {len(options.runs)}")
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(open_log(path)) for path in options.runs]
        stack.enter_context(shown_progress())("making the page", None, None)
        page = html(*logs, title=options.title, names=options.name, metrics=options.metric)
    try:
        page.save(options.out)
    except OSError as error:
        raise InputError(f"cannot write {options.out}: {error.strerror}") from error
    console = for_people(options.json)
    for found in page.verdicts:
        console.print(Text(found.status, style=_STYLES.get(found.status, "bold")), Text(found.sentence))
    console.print(Text(f"{options.out} ({len(page.text.encode()) / 1e6:.1f} MB)", style="dim"))
    verdicts = [
        {"run": str(path), "status": found.status, "sentence": found.sentence}
        for path, found in zip(options.runs, page.verdicts)
    ]
    document = {"schema_version": SCHEMA_VERSION, "report": str(options.out), "runs": verdicts}
    write_document(options.json, document)
    return HEALTHY if all(found.status in _FINE for found in page.verdicts) else FOUND


def _same(out: Path, path: Path) -> bool:
    return path.exists() and out.samefile(path)
