"""The command line: `hnf-attention demo`, `check`, `analyze` and `doctor`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console

from ..errors import InputError
from ..names import display_name

HEALTHY, FOUND, USAGE = 0, 1, 2
_LOG_WIDTH = 140  # columns


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (argparse exits by itself, with 2, on wrong options)."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except InputError as error:
        print(f"hnf-attention: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("hnf-attention: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hnf-attention", description="Watch, diagnose and treat attention in transformers."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="break a small transformer, see it coming, treat it",
        description="Train a small byte-level GPT on this Python's standard library until its attention breaks,"
        " warn before the loss shows it, then train it again with the proposed intervention. "
        "Exit code 0 if the warning came first and the treated run ended better, else 1.",
    )
    demo.add_argument("--seed", type=int, default=0, help="of weights and data order (default 0)")
    demo.add_argument("--steps", type=int, help="of each of the two runs (default 400)")
    demo.add_argument(
        "--out", type=Path, default=Path("hnf-attention-demo"), metavar="DIR", help="for figures and JSON"
    )
    demo.set_defaults(command=_demo)

    analyze = commands.add_parser(
        "analyze",
        help="judge the attention of a Hugging Face model on a text",
        description="Run a text through a causal or masked language model and judge its attention. "
        "Exit code 0 healthy, 1 issues of severity error, 2 bad usage or nothing that can be measured.",
    )
    analyze.add_argument("model", metavar="MODEL", help="name on the Hugging Face hub, or a local folder")
    analyze.add_argument("--text", type=Path, required=True, metavar="FILE", help="text to run, UTF-8")
    analyze.add_argument(
        "--window",
        type=_positive,
        metavar="N",
        help="tokens per window (default: the model's own length, at most 1024)",
    )
    analyze.add_argument(
        "--batch-size", type=_positive, default=8, metavar="N", help="windows at once (default 8)"
    )
    analyze.add_argument("--max-windows", type=_positive, metavar="N", help="stop after that many windows")
    analyze.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    analyze.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    analyze.add_argument("--json", metavar="PATH", help="write a JSON document there; - for standard output")
    analyze.set_defaults(command=_analyze)

    check = commands.add_parser(
        "check",
        help="will this design's attention be stable? before training, from a configuration",
        description="Predict the attention of a design at initialisation from its configuration, without building "
        "the model, and say what would make it stable. "
        "Exit code 0 stable or marginal, 1 unstable, 2 bad usage or a configuration that lacks something.",
    )
    check.add_argument(
        "config",
        metavar="CONFIG_OR_MODEL",
        help="JSON file with a configuration or plain numbers, a model's folder, or a name on the hub",
    )
    check.add_argument(
        "--seq-len", type=_positive, metavar="N", help="visible keys (default: the model's own)"
    )
    check.add_argument("--dtype", metavar="NAME", help="of q, k and v: bf16, fp16, fp8, ...")
    check.add_argument(
        "--weights", action="store_true", help="load the checkpoint too: what its heads allow, and do"
    )
    check.add_argument("--region", metavar="PATH", help="draw the region of stable temperatures there")
    check.add_argument("--json", metavar="PATH", help="write a JSON document there; - for standard output")
    check.set_defaults(command=_check)

    doctor = commands.add_parser(
        "doctor",
        help="what this machine computes attention with, and whether it does so correctly",
        description="Print versions, the card, which path each head dimension takes, and test small calls"
        " against double precision. Exit code 0 if the self-test passes, else 1.",
    )
    doctor.set_defaults(command=_doctor)
    return parser


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return value


def _demo(options: argparse.Namespace) -> int:
    from .demo import Config, run_demo

    chosen = {} if options.steps is None else {"steps": options.steps}
    outcome = run_demo(Config(seed=options.seed, **chosen), options.out, _console(sys.stdout))
    return FOUND if outcome.broken_promises else HEALTHY


def _analyze(options: argparse.Namespace) -> int:
    from rich.progress import Progress
    from rich.text import Text

    from ..report.tables import issue_list, layer_table
    from .analyze import analyze

    target = None if options.json in (None, "-") else Path(options.json)
    if target is not None:
        _check_target(target)
    # With the document on standard output, everything for people goes to standard error.
    console = _console(sys.stderr if options.json == "-" else sys.stdout)
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
    verdict = "not healthy" if diagnosis.errors else "healthy"
    counts = f"{len(diagnosis.errors)} errors, {len(diagnosis.warnings)} warnings"
    console.print(Text(f"\n{verdict}: {counts}", style="bold"))
    for layer, why in analysis.coverage.not_measured.items():
        console.print(Text(f"not measured: {display_name(layer)}: {why}", style="yellow"))
    if options.json is not None:
        document = json.dumps(analysis.to_dict(), indent=1, allow_nan=False) + "\n"
        _write(target, document)
    return FOUND if diagnosis.errors else HEALTHY


def _check(options: argparse.Namespace) -> int:
    from ..report.check import verdict
    from .check import check, region_of

    target = None if options.json in (None, "-") else Path(options.json)
    figure = None if options.region is None else Path(options.region)
    for path, option in ((target, "--json"), (figure, "--region")):
        if path is not None:
            _check_target(path, option)
    console = _console(sys.stderr if options.json == "-" else sys.stdout)
    report, config = check(options.config, options.seq_len, options.dtype, options.weights)
    console.print(verdict(report, options.config))
    if figure is not None:
        region_of(config, options.seq_len, options.dtype).plot(figure)
    if options.json is not None:
        _write(target, json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n")
    return HEALTHY if report.healthy else FOUND


def _doctor(options: argparse.Namespace) -> int:
    from rich.table import Table

    from . import doctor

    console = _console(sys.stdout)
    for name, version in doctor.software().items():
        console.print(f"{name} {version or 'not installed'}", highlight=False)
    console.print(doctor.card(), highlight=False)
    table = Table("forward / backward", "head dimensions", title="Paths of a plain causal training step")
    for path, taken in doctor.paths().items():
        table.add_row(path, doctor.by_dtype(taken))
    console.print(table)
    table = Table("engine: reason", "head dimensions", title="Why no faster engine is taken")
    for reason, refused in doctor.reasons().items():
        table.add_row(reason, refused)
    console.print(table)
    columns = ("dtype", "head dim", "causal", "output", "statistics", "gradients", "")
    table = Table(*columns, title=f"Errors against double precision, {doctor.LENGTH} tokens")
    trials = list(doctor.self_test())
    for trial in trials:
        numbers = (f"{x:.1e}" for x in (trial.out, trial.statistics, trial.gradients))
        name, causal = str(trial.dtype).removeprefix("torch."), "yes" if trial.is_causal else "no"
        table.add_row(name, str(trial.head_dim), causal, *numbers, "ok" if trial.passed else "WRONG")
    console.print(table)
    failed = sum(not trial.passed for trial in trials)
    console.print(f"{failed} of {len(trials)} self-tests failed" if failed else "self-test passed")
    return FOUND if failed else HEALTHY


def _check_target(target: Path, option: str = "--json") -> None:
    """A document that cannot be written is known before the model runs rather than after it."""
    if not target.parent.is_dir():
        raise InputError(f"expected {option} in an existing folder, got {target}")
    place = target if os.path.exists(target) else target.parent
    if os.path.isdir(target) or not os.access(place, os.W_OK):
        raise InputError(f"expected {option} to be a file that can be written, got {target}")


def _write(target: Path | None, document: str) -> None:
    if target is None:
        sys.stdout.write(document)
        return
    try:
        target.write_text(document, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}") from error


def _console(stream: TextIO) -> Console:
    """As wide as the terminal; elsewhere (a file, a CI log) wide enough that no table is squeezed."""
    console = Console(file=stream)
    if not console.is_terminal:
        console.width = _LOG_WIDTH
    return console
