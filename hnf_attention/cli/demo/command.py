"""The two runs of the demo, what it prints, and its verdict."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from ...errors import InputError
from ...report import html
from ...report.tables import STYLES, issue_list
from ...run_log import RunLog, RunLogWriter
from ..devices import device_of
from ..exit_codes import FOUND, HEALTHY
from ..output import check_targets, for_people, make_folder, write_document
from . import artifacts
from .outcome import HINDSIGHT_GAP, Outcome, judge
from .training import QUICK, Config, Run, train
from .view import View, describe

_MOST_ISSUES = 3
_LOG, _REPORT = "monitor.log", "report.html"
_RUNS = {False: "untreated.db", True: "treated.db"}  # names of the run logs


def run(options: argparse.Namespace) -> int:
    check_targets({"--json": options.json})
    recipe = QUICK if options.quick else Config()
    config = replace(
        recipe,
        seed=options.seed,
        steps=recipe.steps if options.steps is None else options.steps,
        device=str(device_of(options.device or "cpu")),
    )
    outcome, document = run_demo(config, options.out, for_people(options.json))
    write_document(options.json, document)
    return FOUND if outcome.broken_promises else HEALTHY


def run_demo(config: Config, out: Path, console: Console) -> tuple[Outcome, dict[str, Any]]:
    """Train twice from one seed, untreated and treated.

    Saves figures, JSON, the monitor's log, the run logs and a report of both in `out`.

    Returns the outcome and the JSON document.
    Raises InputError if the interpreter has no standard library sources, or if `out` cannot be written.
    """
    make_folder(out)
    console.print(
        f"A {config.layers}-layer byte-level GPT learns this Python's standard library. Its learning rate "
        f"warms up to {config.peak_learning_rate:g} and its attention runs at 1/{config.sharpness:g} of the "
        f"usual temperature. Seed {config.seed}, {config.steps} steps, twice."
    )
    with _log_file(out / _LOG), _one_thread():
        untreated = _train(config, False, console, out)
        treated = _train(config, True, console, out)
    issues = [] if untreated.last_diagnosis is None else untreated.last_diagnosis.issues
    console.print(Text("\nWorst issues at the end of the untreated run", style="bold"))
    console.print(issue_list(issues, limit=_MOST_ISSUES, training=True))
    outcome = judge(untreated, treated)
    document = artifacts.to_document(config, untreated, treated, outcome)
    try:
        paths = [*artifacts.save(out, document, untreated, treated, outcome), _report(out)]
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}") from error
    _print_verdict(console, outcome, treated.interventions)
    names = ", ".join([*(path.name for path in paths), *_RUNS.values(), _LOG])
    console.print(f"\nSaved in {out}: {names}", highlight=False, markup=False)
    return outcome, document


def _train(config: Config, treated: bool, console: Console, out: Path) -> Run:
    title = "treated as the monitor proposes" if treated else "untreated"
    path = out / _RUNS[treated]
    for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):  # of an earlier demo
        (out / name).unlink(missing_ok=True)
    writer = RunLogWriter(path, about=asdict(config) | {"treated": treated})
    console.print(Text(f"\nThe run, {title}", style="bold"))
    view = View(console, config, title)
    with view.live():
        finished = train(config, treated, view.observe, writer)
    if not console.is_terminal:
        console.print(view.table)
    return finished


def _report(out: Path) -> Path:
    """Both runs side by side, as a page."""
    path = out / _REPORT
    with RunLog(out / _RUNS[False]) as untreated, RunLog(out / _RUNS[True]) as treated:
        names = ["untreated", "treated"]
        html(untreated, treated, title="hnf-attention demo", names=names).save(path)
    return path


@contextmanager
def _one_thread() -> Iterator[None]:
    """The model is too small to gain from more threads. With one, sums are the same on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Send the monitor's own log to a file, so that it does not disturb the display."""
    logger = logging.getLogger("hnf_attention")
    handler = logging.FileHandler(path, mode="w", encoding="utf-8")
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
        handler.close()


def _print_verdict(
    console: Console, outcome: Outcome, interventions: list[tuple[int, dict[str, Any]]]
) -> None:
    lines = []
    if outcome.warning_step is not None:
        alarm = "" if outcome.alarm_step is None else f"; first error at step {outcome.alarm_step}"
        lines.append(f"Warning at step {outcome.warning_step}{alarm}.")
    if outcome.sign is not None:
        lead = "" if outcome.lead is None else f", {outcome.lead} steps later"
        lines.append(
            f"The loss shows it at step {outcome.sign.step}{lead} ({outcome.sign.kind}: {outcome.sign.text})."
        )
    if outcome.hindsight_step is not None:
        lines.append(
            f"With hindsight: {HINDSIGHT_GAP} nat behind the treated run from step "
            f"{outcome.hindsight_step} on."
        )
    if interventions:
        kinds = "; ".join(dict.fromkeys(describe(intervention) for _, intervention in interventions))
        times = "once" if len(interventions) == 1 else f"at {len(interventions)} steps"
        lines.append(f"Treated from step {interventions[0][0]} on, {times}: {kinds}.")
    if outcome.lost_steps:
        lines.append(f"It trained {outcome.lost_steps} steps more, in place of those that it gave up.")
    lines.append(
        f"Final loss on held-out text: untreated {outcome.untreated_loss:.2f}, treated "
        f"{outcome.treated_loss:.2f} nats per byte."
    )
    console.print(Text("\nVerdict", style="bold"))
    for line in lines:
        console.print(f"  {line}", highlight=False)
    for broken in outcome.broken_promises:
        console.print(Text(f"  Not as promised: {broken}.", style=STYLES["error"]))
    if not outcome.broken_promises:
        console.print(Text("  Seen before the loss showed it, and treated.", style="bold green"))
