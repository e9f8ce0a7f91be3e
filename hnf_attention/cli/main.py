"""The command line: `hnf-attention demo`, `check`, `analyze` and `doctor`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from ..errors import InputError
from .exit_codes import INTERRUPTED, USAGE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Wrong options end the process with code 2."""
    options = _parser().parse_args(arguments)
    try:
        # Imported here, so that a help text and a wrong option do not wait for torch.
        code: int = import_module(f".{options.command}", __package__).run(options)
        return code
    except InputError as error:
        print(f"hnf-attention: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("hnf-attention: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    """Each command is a module beside this one, with a `run(options) -> exit code`."""
    parser = argparse.ArgumentParser(
        prog="hnf-attention", description="Watch, diagnose and treat attention in transformers."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(
        commands.add_parser(
            "demo",
            help="train a small transformer until it breaks, with a warning first and a treatment after",
            description="Train a small byte-level GPT on this Python's standard library until its attention breaks."
            " The monitor warns before the loss shows it. Then train again with the proposed intervention."
            " Exit code 0 if the warning came first and the treated run ended better, else 1.",
        )
    )
    _add_analyze(
        commands.add_parser(
            "analyze",
            help="judge the attention of a Hugging Face model on a text",
            description="Run a text through a causal or masked language model and judge its attention."
            " Exit code 0 if healthy, 1 if there are issues of severity error, 2 for bad usage and if nothing can be"
            " measured.",
        )
    )
    _add_check(
        commands.add_parser(
            "check",
            help="judge a design before training, from its configuration",
            description="Predict the attention of a design at initialisation from its configuration, without building"
            " the model, and say what would make it stable."
            " Exit code 0 if stable or marginal, 1 if unstable, 2 for bad usage and incomplete configurations.",
        )
    )
    commands.add_parser(
        "doctor",
        help="show what computes attention on this machine, and test it",
        description="Print versions, the card, and the path that each head dimension takes, and test small calls"
        " against double precision. Exit code 0 if the self-test passes, else 1.",
    )
    return parser


def _add_demo(demo: argparse.ArgumentParser) -> None:
    demo.add_argument("--seed", type=int, default=0, help="of weights and data order (default 0)")
    demo.add_argument("--steps", type=int, help="of each of the two runs (default 400)")
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("hnf-attention-demo"),
        metavar="DIR",
        help="folder for figures and JSON (default hnf-attention-demo)",
    )


def _add_analyze(analyze: argparse.ArgumentParser) -> None:
    analyze.add_argument("model", metavar="MODEL", help="name on the Hugging Face hub, or a local folder")
    analyze.add_argument("--text", type=Path, required=True, metavar="FILE", help="text to run, UTF-8")
    analyze.add_argument(
        "--window",
        type=_positive,
        metavar="N",
        help="tokens per window (default: the model's own length, at most 1024)",
    )
    analyze.add_argument(
        "--batch-size", type=_positive, default=8, metavar="N", help="windows that run at once (default 8)"
    )
    analyze.add_argument("--max-windows", type=_positive, metavar="N", help="stop after that many windows")
    analyze.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    analyze.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default float32"
    )
    _add_json(analyze)


def _add_check(check: argparse.ArgumentParser) -> None:
    check.add_argument(
        "config",
        metavar="CONFIG_OR_MODEL",
        help="JSON file with a configuration or plain numbers, a model's folder, or a name on the hub",
    )
    check.add_argument(
        "--seq-len", type=_positive, metavar="N", help="visible keys (default: the model's own length)"
    )
    check.add_argument("--dtype", metavar="NAME", help="of q, k and v: bf16, fp16, fp8, ...")
    check.add_argument(
        "--weights",
        action="store_true",
        help="load the checkpoint, too: the largest scores that its heads allow, and those on random tokens",
    )
    check.add_argument("--region", metavar="PATH", help="write a figure of the stable temperatures there")
    _add_json(check)


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", metavar="PATH", help="write a JSON document there; - for standard output")


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return value
