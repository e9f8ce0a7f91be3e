"""`hnf-attention export`: a run log as a file that other programs read."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import InputError
from ..run_log.export import to_jsonl, to_parquet
from .exit_codes import HEALTHY
from .output import check_target, for_people, write_document
from .progress import shown_progress
from .run_logs import open_log

SCHEMA_VERSION = 1
_WRITERS = {".parquet": to_parquet, ".jsonl": to_jsonl}


def run(options: argparse.Namespace) -> int:
    check_target(options.json, "--json")
    check_target(options.out, "--out")
    target = Path(options.out)
    writer = _WRITERS.get(target.suffix)
    if writer is None:
        raise InputError(f"expected --out to end in {' or '.join(_WRITERS)}, got {options.out}")
    with open_log(options.run) as log, shown_progress() as show:
        steps = log.steps
        try:
            writer(log, target, lambda done, total: show("log steps", done, total))
        except OSError as error:
            raise InputError(f"cannot write {target}: {error.strerror or error}") from error
    size = target.stat().st_size
    for_people(options.json).print(f"{len(steps)} log steps: {target}, {size:,} bytes", highlight=False)
    document = {
        "schema_version": SCHEMA_VERSION,
        "log_steps": len(steps),
        "file": str(target),
        "bytes": size,
    }
    write_document(options.json, document)
    return HEALTHY
