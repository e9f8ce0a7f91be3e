"""The options of every command. Nothing slow is imported, so that help and a wrong option do not wait for torch."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ..errors import InputError
from ..versions import DISTRIBUTION, __version__
from .examples import EXAMPLES

SHELLS = ("bash", "zsh", "tcsh")  # what shtab completes in
_WIDTH = 78  # columns of a description
_LARGEST = 2**63 - 1  # what PyTorch takes


class Parser(argparse.ArgumentParser):
    """A parser that raises InputError for wrong options, so that every error of the command line is one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def make_parser() -> Parser:
    """The parser of `hnf-attention`. `command` is None without a command, else the name of its module."""
    parser = Parser(
        prog="hnf-attention",
        description="Watch, diagnose and treat attention in transformers.",
        epilog="hnf-attention COMMAND --help shows the options of a command, with examples.",
    )
    parser.add_argument("--version", action="version", version=f"{DISTRIBUTION} {__version__}")
    parser.add_argument(
        "--print-completion",
        choices=SHELLS,
        metavar="SHELL",
        help=f"print the script that completes commands and options in {', '.join(SHELLS[:-1])} or {SHELLS[-1]}",
    )
    parser.set_defaults(debug=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _command(
        commands,
        _add_demo,
        "demo",
        "train a small transformer until it breaks, with a warning first and a treatment after",
        "Train a small byte-level GPT on this Python's standard library until its attention breaks."
        " The monitor warns before the loss shows it. Then train again with the proposed intervention.",
        ("the warning came first and the treated run ended better", "one of the two failed"),
    )
    _command(
        commands,
        _add_analyze,
        "analyze",
        "judge the attention of a Hugging Face model on a text",
        "Run a text through a causal or masked language model and judge its attention.",
        ("no issues of severity error", "there are some"),
    )
    _command(
        commands,
        _add_check,
        "check",
        "judge a design before training, from its configuration",
        "Predict the attention of a design at initialisation from its configuration, without building the model,"
        " and say what would make it stable. Several designs are put side by side: margins, required bits, stable"
        " temperatures, and what each advised change costs.",
        ("stable or marginal; of several, all", "unstable, or not known"),
    )
    _command(
        commands,
        _add_trace,
        "trace",
        "find where NaN or inf begins in one step, and why",
        "Run one training step again and find where NaN or inf begins: layer, head, row, operation and cause. TARGET is"
        " FILE.py:FUNCTION or MODULE:FUNCTION, whose function returns the step, or a Hugging Face model, which runs a"
        " text with the text itself as labels.",
        ("the whole step is finite", "it is not, and the origin is printed"),
    )
    _command(
        commands,
        _add_report,
        "report",
        "show a run log, or two, as one HTML file",
        "Write one HTML file about a run that a RunLogWriter logged: the verdict, each issue with its story, every head"
        " over the whole run, the loss. With a second run, both side by side. The file needs no network.",
        ("the run is healthy or recovered; of two, both", "one failed, is at risk, or was not judged"),
    )
    _command(
        commands,
        _add_watch,
        "watch",
        "show a run in the terminal while it trains",
        "Follow the run log that a RunLogWriter writes: every head of every layer, and issues as they come.",
        ("the last log step has no issue of severity error", "it has one"),
    )
    _command(
        commands,
        _add_export,
        "export",
        "write a run log as Parquet or JSON lines",
        "Write a run log as a file that other programs read: Parquet (a row for each head and log step) or JSON lines.",
        ("the file is written", "never"),
    )
    _command(
        commands,
        _add_doctor,
        "doctor",
        "show what computes attention on this machine, and test it",
        "Print versions, the card, the engine that each kind of call takes and why not a faster one. Test small calls,"
        " and the measuring of a small model, against double precision. With --warm, compile first what common calls"
        " and monitors need, so that a run does not wait for it.",
        ("every self-test passes", "one fails"),
    )
    return parser


def _command(
    commands: Any,  # argparse gives what `add_subparsers` returns no public name
    add_options: Callable[[Parser], None],
    name: str,
    summary: str,
    description: str,
    codes: tuple[str, str],
) -> None:
    """Add a command with its options, those that all commands have, and examples. codes: what 0 and 1 mean."""
    examples = "\n".join(f"  {example}" for example in EXAMPLES[name])
    meanings = (
        f"exit code:\n  0  {codes[0]}\n  1  {codes[1]}\n  2  wrong options or input; the error says which"
    )
    command = commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, _WIDTH),
        epilog=f"{meanings}\n\nexamples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(command)
    command.add_argument("--json", metavar="PATH", help="write a JSON document there; - for standard output")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _add_doctor(doctor: Parser) -> None:
    warm = doctor.add_argument_group("compiling ahead")
    warm.add_argument(
        "--warm",
        action="store_true",
        help="compile the kernels of the calls below; they stay in Triton's cache",
    )
    warm.add_argument("--heads", type=_positive, metavar="H", help="query heads (default 16)")
    warm.add_argument("--kv-heads", type=_positive, metavar="H", help="key heads (default: as many)")
    warm.add_argument(
        "--head-dim", type=_positive, nargs="+", metavar="D", help="head dimensions (default 64 128)"
    )
    warm.add_argument(
        "--dtype", nargs="+", choices=("bfloat16", "float16", "float32"), help="dtypes (default bfloat16)"
    )
    warm.add_argument(
        "--length",
        type=_positive,
        nargs="+",
        metavar="N",
        help="tokens; lengths that 16 divides and others have kernels of their own (default 1024 1000)",
    )


def _add_demo(demo: Parser) -> None:
    demo.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="of weights and data order (default 0)"
    )
    demo.add_argument("--steps", type=_positive, metavar="N", help="of each of the two runs (default 400)")
    demo.add_argument("--quick", action="store_true", help="a smaller model, for a quarter of the time")
    _add_device(demo)
    demo.add_argument(
        "--out",
        type=_folder,
        default=Path("hnf-attention-demo"),
        metavar="DIR",
        help="folder for figures, JSON, run logs and a report (default hnf-attention-demo)",
    )


def _add_analyze(analyze: Parser) -> None:
    analyze.add_argument("model", metavar="MODEL", help="name on the Hugging Face hub, or a local folder")
    _add_model_on_text(analyze)
    analyze.add_argument("--max-windows", type=_positive, metavar="N", help="stop after that many windows")
    analyze.add_argument(
        "--threshold",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="judge by another threshold; repeat for more (names: docs/thresholds.md)",
    )
    analyze.add_argument(
        "--figures", type=_folder, metavar="DIR", help="folder for figures of entropy and curvature"
    )
    analyze.add_argument(
        "--fail-on",
        choices=("error", "warning"),
        default="error",
        help="the mildest severity of an issue that gives exit code 1 (default error)",
    )


def _add_trace(trace: Parser) -> None:
    trace.add_argument(
        "target",
        metavar="TARGET",
        help="FILE.py:FUNCTION, MODULE:FUNCTION, a model's folder, or its name on the hub",
    )
    _add_model_on_text(trace)
    trace.add_argument(
        "--inputs",
        type=Path,
        metavar="FILE",
        help="safetensors file with the model's arguments by name, labels included, in place of a text",
    )
    trace.add_argument(
        "--autocast", choices=("float16", "bfloat16"), help="run the model under autocast to that format"
    )
    trace.add_argument("--no-wide", action="store_true", help="do not run the step in double precision, too")
    trace.add_argument(
        "-o",
        "--out",
        type=_folder,
        metavar="DIR",
        help="write a minimal reproduction there: tensors and a script",
    )


def _add_report(report: Parser) -> None:
    report.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="run log, such as run.db; at most two"
    )
    report.add_argument(
        "-o",
        "--out",
        default="report.html",
        metavar="FILE",
        help="where the page goes; - for standard output (default report.html)",
    )
    report.add_argument("--title", metavar="TEXT", help="of the page (default: the runs' names)")
    report.add_argument(
        "--name", action="append", metavar="TEXT", help="of a run (default: its file's); once for each run"
    )
    report.add_argument(
        "--metric",
        action="append",
        metavar="NAME",
        help="statistic on the page; repeat for more (default: as many of the most telling ones as fit)",
    )


def _add_watch(watch: Parser) -> None:
    _add_run(watch)
    watch.add_argument(
        "--metric",
        default="logit_range_max",
        metavar="NAME",
        help="what the cells show (default logit_range_max, the largest range of a row's scores)",
    )
    watch.add_argument(
        "--every", type=_seconds, default=2.0, metavar="SECONDS", help="between two looks (default 2)"
    )
    watch.add_argument("--once", action="store_true", help="print the present state and end")


def _add_export(export: Parser) -> None:
    _add_run(export)
    export.add_argument(
        "-o",
        "--out",
        required=True,
        metavar="FILE",
        help="the file to write, ending in .parquet or .jsonl; - for JSON lines on standard output",
    )


def _add_run(command: Parser) -> None:
    command.add_argument("run", metavar="RUN", help="a run log, such as run.db")


def _add_model_on_text(command: Parser) -> None:
    """The options of a Hugging Face model that runs a text."""
    command.add_argument(
        "--text", type=Path, metavar="FILE", help="text to run, UTF-8 (default: a built-in English text)"
    )
    command.add_argument(
        "--window",
        type=_positive,
        metavar="N",
        help="tokens per window (default: the model's own length, at most 1024)",
    )
    command.add_argument(
        "--batch-size", type=_positive, default=8, metavar="N", help="windows that run at once (default 8)"
    )
    command.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a model on the hub")
    command.add_argument(
        "--attn-implementation",
        metavar="NAME",
        help="eager, sdpa, flex_attention, ... (default: the model's own)",
    )
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "auto"),
        default="float32",
        help="of the model's weights; auto takes the checkpoint's (default float32)",
    )
    _add_device(command)
    command.add_argument(
        "--device-map",
        metavar="NAME",
        help="spread the model over devices with accelerate: auto, balanced, ...",
    )


def _add_check(check: Parser) -> None:
    check.add_argument(
        "designs",
        nargs="+",
        metavar="CONFIG_OR_MODEL",
        help="JSON file with a configuration or plain numbers, a model's folder, or a name on the hub; several are"
        " compared side by side",
    )
    check.add_argument(
        "--seq-len", type=_positive, metavar="N", help="visible keys (default: the model's own length)"
    )
    check.add_argument("--dtype", metavar="NAME", help="of q, k and v: bf16, fp16, fp8, ...")
    check.add_argument(
        "--learning-rate",
        type=float,
        metavar="RATE",
        help="the largest of the training run (Adam): how often attention harmed such runs, counted in the verdict",
    )
    check.add_argument(
        "--warmup", type=int, metavar="STEPS", help="steps up to the learning rate (default 100)"
    )
    check.add_argument(
        "--weights",
        action="store_true",
        help="load the checkpoint, too: the largest scores that its heads allow, and those on random tokens",
    )
    check.add_argument(
        "--region",
        metavar="PATH",
        help="draw the stable temperatures there, as .png, .svg or .pdf; - for PNG on standard output",
    )
    check.add_argument(
        "--fail-on",
        choices=("unstable", "marginal"),
        default="unstable",
        help="the mildest verdict that gives exit code 1 (default unstable)",
    )


def _add_device(command: Parser) -> None:
    command.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:N or mps (default cpu)")


def _folder(text: str) -> Path:
    if text == "-":
        raise argparse.ArgumentTypeError("expected a folder, got - (./- is a folder of that name)")
    return Path(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) > _LARGEST:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to {_LARGEST}, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.05 <= value <= 86_400:
        raise argparse.ArgumentTypeError(f"expected seconds, at least 0.05, got {text!r}")
    return value


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if not 1 <= value <= _LARGEST:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return value
