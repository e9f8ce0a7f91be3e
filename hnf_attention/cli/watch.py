"""`hnf-attention watch`: a run log in a terminal, while it grows."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from rich.console import Console
from rich.live import Live

from ..errors import InputError
from ..run_log import RunLog
from ..run_log.metrics import METRICS
from ..run_log.records import plain
from .exit_codes import FOUND, HEALTHY
from .output import check_targets, console, for_people, write_document
from .progress import shown_progress
from .run_logs import open_log
from .terminal import Watched, view

SCHEMA_VERSION = 1


def run(options: argparse.Namespace) -> int:
    check_targets({"--json": options.json}, [options.run])
    metric = next((metric for metric in METRICS if metric.name == options.metric), None)
    if metric is None:
        names = ", ".join(metric.name for metric in METRICS)
        raise InputError(f"expected --metric to be one of {names}, got {options.metric}")
    screen = for_people(options.json) if options.json else console(sys.stdout)
    with open_log(options.run) as log:
        watched = Watched(metric)
        with shown_progress() as show:
            show("reading the run log", None, None)
            watched.update(log)
        if options.once or options.json or not screen.is_terminal:
            screen.print(view(watched, screen.width, None))
        else:
            _follow(screen, log, watched, options.every)
        write_document(options.json, _document(log, watched))
        return FOUND if any(issue.get("severity") == "error" for issue in log.issues) else HEALTHY


def _follow(screen: Console, log: RunLog, watched: Watched, every: float) -> None:
    """Redraw until the user interrupts."""
    with Live(console=screen, screen=True, auto_refresh=False) as live:
        try:
            while True:
                live.update(view(watched, screen.width, screen.height), refresh=True)
                time.sleep(every)
                watched.update(log)
        except KeyboardInterrupt:
            return


def _document(log: RunLog, watched: Watched) -> dict[str, Any]:
    return plain(
        {
            "schema_version": SCHEMA_VERSION,
            "run": str(log.path),
            "log_steps": len(watched.steps),
            "step": watched.steps[-1] if watched.steps else None,
            "verdict": watched.verdict,
            "issues": watched.issues,
            "metric": watched.metric.name,
            "layers": {name: values.tolist() for name, values in watched.latest.items()},
            "not_measured": watched.missed,
        }
    )
