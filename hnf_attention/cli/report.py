"""`hnf-attention report`: a run log, or two, as one HTML file."""

from __future__ import annotations

import argparse
import contextlib

from rich.text import Text

from ..errors import InputError
from ..report import html
from .exit_codes import FOUND, HEALTHY
from .output import check_targets, for_people, shown, write_document, write_page
from .progress import shown_progress
from .run_logs import open_log

SCHEMA_VERSION = 1

_STYLES = {"failed": "bold red", "at risk": "bold yellow", "recovered": "green", "healthy": "green"}
_FINE = ("healthy", "recovered")


def run(options: argparse.Namespace) -> int:
    """Write the page and print the verdicts."""
    check_targets({"--out": options.out, "--json": options.json}, options.runs)
    if len(options.runs) > 2:
        raise InputError(f"expected one or two run logs, got {len(options.runs)}")
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(open_log(path)) for path in options.runs]
        stack.enter_context(shown_progress())("making the page", None, None)
        page = html(*logs, title=options.title, names=options.name, metrics=options.metric)
    write_page(options.out, page.text)
    console = for_people(options.out, options.json)
    for found in page.verdicts:
        console.print(Text(found.status, style=_STYLES.get(found.status, "bold")), Text(found.sentence))
    console.print(Text(f"{shown(options.out)} ({len(page.text.encode()) / 1e6:.1f} MB)", style="dim"))
    verdicts = [
        {"run": str(path), "status": found.status, "sentence": found.sentence}
        for path, found in zip(options.runs, page.verdicts)
    ]
    document = {"schema_version": SCHEMA_VERSION, "report": options.out, "runs": verdicts}
    write_document(options.json, document)
    return HEALTHY if all(found.status in _FINE for found in page.verdicts) else FOUND
