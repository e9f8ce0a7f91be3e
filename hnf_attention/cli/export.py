"""`hnf-attention export`: a run log as a file that other programs read."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..errors import InputError
from ..run_log.export import to_jsonl, to_parquet
from .exit_codes import HEALTHY
from .output import STANDARD, check_targets, for_people, shown, write_document
from .progress import shown_progress
from .run_logs import open_log

SCHEMA_VERSION = 1
_WRITERS = {".parquet": to_parquet, ".jsonl": to_jsonl}


def run(options: argparse.Namespace) -> int:
    check_targets({"--out": options.out, "--json": options.json}, [options.run])
    to_standard = options.out == STANDARD
    if not to_standard and Path(options.out).suffix not in _WRITERS:
        raise InputError(f"expected --out to end in {' or '.join(_WRITERS)}, got {options.out}")
    with open_log(options.run) as log, shown_progress() as show:
        steps = log.steps

        def progress(done: int, total: int) -> None:
            show("log steps", done, total)

        if to_standard:
            to_jsonl(log, sys.stdout, progress)
        else:
            try:
                _WRITERS[Path(options.out).suffix](log, options.out, progress)
            except OSError as error:
                raise InputError(f"cannot write {options.out}: {error.strerror or error}") from error
    size = None if to_standard else Path(options.out).stat().st_size
    screen = for_people(options.out, options.json)
    screen.print(
        f"{len(steps)} log steps: {shown(options.out)}{'' if size is None else f', {size:,} bytes'}",
        highlight=False,
    )
    document = {
        "schema_version": SCHEMA_VERSION,
        "log_steps": len(steps),
        "file": options.out,
        "bytes": size,
    }
    write_document(options.json, document)
    return HEALTHY
