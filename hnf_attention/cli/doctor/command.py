"""What the doctor prints, and the document that says the same."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from ...engine.card import current_device
from ..exit_codes import FOUND, HEALTHY
from ..output import check_targets, for_people, write_document
from ..progress import shown_progress
from . import calls, machine, warm
from .low_scores import SCORE, LowScores, low_scores
from .self_test import LENGTH, Trial, self_test
from .watched import Watched, watch

SCHEMA_VERSION = 1


def run(options: argparse.Namespace) -> int:
    """Print everything; the exit code says whether the self-tests passed."""
    check_targets({"--json": options.json})
    warm.check(options)
    screen = for_people(options.json)
    _print_machine(screen)
    warmed = _warm(screen, options) if options.warm else None
    _print_engines(screen)
    with shown_progress() as show:
        show("self-test of calls", None, None)
        trials = list(self_test())
        show("self-test of low scores", None, None)
        low = low_scores()
        show("self-test of measuring a model", None, None)
        watched = watch()
    failed = [trial for trial in trials if not trial.passed]
    _print_self_test(screen, trials, low, watched)
    if failed:
        screen.print(f"{len(failed)} of {len(trials)} self-tests of calls failed")
    if not low.passed:
        screen.print("the self-test of low scores failed")
    if not watched.passed:
        screen.print("the self-test of measuring a model failed")
    passed = not failed and low.passed and watched.passed
    if passed:
        screen.print("self-test passed")
    write_document(options.json, _document(trials, low, watched, passed) | {"warm": warmed})
    return HEALTHY if passed else FOUND


def _print_machine(screen: Console) -> None:
    for name, version in machine.software().items():
        screen.print(f"{name} {version or 'not installed'}", highlight=False)
    screen.print(machine.card_text(), highlight=False)
    screen.print(machine.auto_text(), highlight=False)
    table = _table("Extras", "extra", "packages")
    for name, packages in machine.extras().items():
        table.add_row(name, machine.extra_text(packages))
    screen.print(table)


def _warm(screen: Console, options: argparse.Namespace) -> dict[str, Any]:
    """Compile ahead, and print what took how long; the same as a document."""
    table = _table("Compiled ahead: attention and its backward, and each kind of monitor", "calls", "seconds")
    shapes, seconds = list(warm.shapes(options)), {}
    with shown_progress() as show:
        for number, shape in enumerate(shapes, 1):
            show(f"compiling {shape}", number, len(shapes))
            seconds[str(shape)] = warm.warm(shape, current_device())
    for name, taken in seconds.items():
        table.add_row(name, f"{taken:.1f}")
    screen.print(table)
    folder = str(warm.cache_folder())
    screen.print(f"{sum(seconds.values()):.1f} s in all; kept in {folder}", highlight=False, soft_wrap=True)
    return {"seconds": seconds, "cache": folder}


def _print_engines(screen: Console) -> None:
    table = _table("Engines of a plain causal training step", "forward / backward", "head dimensions")
    for engines, head_dims in calls.by_head_dim().items():
        table.add_row(engines, calls.by_dtype(head_dims))
    screen.print(table)
    table = _table("Why no faster engine is taken there", "engine: reason", "head dimensions")
    for reason, refused in calls.reasons().items():
        table.add_row(reason, refused)
    screen.print(table)
    title = f"Engines of each kind of call ({calls.kinds_text()})"
    table = _table(title, "call", "forward", "backward", "why no faster engine")
    alike: dict[tuple[str, str, str], list[str]] = {}
    for kind in calls.kinds():
        alike.setdefault((kind.forward, kind.backward, _by_reason(kind.reasons)), []).append(kind.kind)
    for taken, names in alike.items():
        table.add_row("\n".join(names), *taken)
    screen.print(table)


def _by_reason(reasons: dict[str, str]) -> str:
    """A reason a line, each after the engines that give it."""
    engines: dict[str, list[str]] = {}
    for engine, reason in reasons.items():
        engines.setdefault(reason, []).append(engine)
    return "\n".join(f"{', '.join(names)}: {reason}" for reason, names in engines.items())


def _print_self_test(screen: Console, trials: list[Trial], low: LowScores, watched: Watched) -> None:
    title = f"Errors against double precision, {LENGTH} tokens"
    table = _table(title, "dtype", "head dim", "causal", "output", "statistics", "gradients", "")
    for trial in trials:
        numbers = (f"{x:.1e}" for x in (trial.out, trial.statistics, trial.gradients))
        name, causal = str(trial.dtype).removeprefix("torch."), "yes" if trial.is_causal else "no"
        table.add_row(name, str(trial.head_dim), causal, *numbers, "ok" if trial.passed else "WRONG")
    screen.print(table)
    screen.print(f"gradients where all scores of a query are {SCORE:g}: {low.text()}", highlight=False)
    errors = ", ".join(f"{name} {error:.1e}" for name, error in watched.errors.items())
    output = "unchanged" if watched.unchanged else "CHANGED"
    screen.print(
        f"measuring a small model: {watched.layers} of {watched.expected} layers measured, output {output}, "
        f"errors against double precision: {errors}: {'ok' if watched.passed else 'WRONG'}",
        highlight=False,
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _document(trials: list[Trial], low: LowScores, watched: Watched, passed: bool) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "versions": machine.software(),
        "extras": machine.extras(),
        "card": machine.card_document(),
        "auto": machine.auto_text(),
        "engines": {
            "by_head_dim": {
                engines: [
                    {"dtype": str(dtype).removeprefix("torch."), "head_dim": head_dim}
                    for dtype, head_dim in taken
                ]
                for engines, taken in calls.by_head_dim().items()
            },
            "kinds": [asdict(kind) for kind in calls.kinds()],
        },
        "self_test": [trial.to_dict() for trial in trials],
        "low_scores": low.to_dict(),
        "instrumentation": watched.to_dict(),
        "passed": passed,
    }
