"""`hnf-attention report`: a run log, or two, as one HTML file."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from rich.text import Text

from ..errors import InputError
from ..report import html
from ..run_log import RunLog
from .exit_codes import FOUND, HEALTHY
from .output import check_target, for_people, write_document

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
        logs = [stack.enter_context(_opened(path)) for path in options.runs]
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
    write_document(options.json, {"report": str(options.out), "runs": verdicts})
    return HEALTHY if all(found.status in _FINE for found in page.verdicts) else FOUND


def _same(out: Path, path: Path) -> bool:
    return path.exists() and out.samefile(path)


def _opened(path: Path) -> RunLog:
    try:
        return RunLog(path)
    except OSError as error:
        raise InputError(f"cannot read the run log {path}: {error.strerror or error}") from error
