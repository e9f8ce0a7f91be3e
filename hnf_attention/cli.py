"""The command line: `hnf-attention demo` and `hnf-attention analyze`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

HEALTHY, FOUND, USAGE = 0, 1, 2


class UsageError(Exception):
    """The user's input cannot be worked with: one line for stderr, exit code 2."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (argparse exits by itself, with 2, on wrong options)."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except UsageError as error:
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
        description="Train a small byte-level GPT on this Python's standard library until its attention breaks, "
        "warn before the loss shows it, then train it again with the proposed intervention. "
        "Exit code 0 if the warning came first and the treated run ended better, else 1.",
    )
    demo.add_argument("--seed", type=int, default=0, help="of weights and data order (default 0)")
    demo.add_argument("--steps", type=int, help="of each of the two runs (default 360)")
    demo.add_argument(
        "--out", type=Path, default=Path("hnf-attention-demo"), metavar="DIR", help="for figures and JSON"
    )
    demo.set_defaults(command=_demo)

    analyze = commands.add_parser(
        "analyze",
        help="judge the attention of a Hugging Face model on a text",
        description="Run a text through a causal or masked language model and judge its attention. "
        "Exit code 0 healthy, 1 findings of severity error, 2 bad usage.",
    )
    analyze.add_argument("model", metavar="MODEL", help="name on the Hugging Face hub, or a local folder")
    analyze.add_argument("--text", type=Path, required=True, metavar="FILE", help="text to run, UTF-8")
    analyze.add_argument(
        "--window", type=_positive, metavar="N", help="tokens per window (default: the model's own length, at most 1024)"
    )
    analyze.add_argument(
        "--batch-size", type=_positive, default=8, metavar="N", help="windows at once (default 8)"
    )
    analyze.add_argument("--max-windows", type=_positive, metavar="N", help="stop after that many windows")
    analyze.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    analyze.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    analyze.add_argument("--json", metavar="PATH", help="write a JSON document there; - for standard output")
    analyze.set_defaults(command=_analyze)
    return parser


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return value


def _demo(options: argparse.Namespace) -> int:
    from rich.console import Console

    from .demo import Config, run_demo

    chosen = {} if options.steps is None else {"steps": options.steps}
    console = Console()
    if not console.is_terminal:
        console.width = 110
    try:
        outcome = run_demo(Config(seed=options.seed, **chosen), options.out, console)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    return HEALTHY if not outcome.broken_promises else FOUND


def _analyze(options: argparse.Namespace) -> int:
    from .analyze import AnalyzeError, run

    try:
        analysis = run(options)
    except AnalyzeError as error:
        raise UsageError(str(error)) from error
    return FOUND if analysis.diagnosis.errors else HEALTHY
