"""The command line: `hnf-attention demo`, `check`, `analyze`, `trace`, `watch`, `report`, `export`, `doctor`."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from ..errors import InputError
from .completion import completion
from .exit_codes import HEALTHY, INTERRUPTED, PIPE_CLOSED, USAGE
from .messages import one_line
from .parser import make_parser

_PACKAGE = Path(__file__).parents[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Every error is one line on standard error and gives code 2: code 1 means that a command found something. Each
    command is a module beside this one, with a `run(options) -> exit code`.
    """
    debug = False
    try:
        parser = make_parser()
        options = parser.parse_args(arguments)
        debug = options.debug
        if options.print_completion is not None:
            print(completion(parser, options.print_completion))
            return HEALTHY
        if options.command is None:
            parser.print_help()
            return HEALTHY
        # Imported here, so that a help text and a wrong option do not wait for torch.
        from .progress import shown_progress

        with shown_progress():
            command = import_module(f".{options.command}", __package__)
        code: int = command.run(options)
        sys.stdout.flush()
        return code
    except InputError as error:
        return _failed(str(error), debug)
    except BrokenPipeError:
        # The interpreter flushes standard output once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except KeyboardInterrupt:
        print("hnf-attention: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        found = f"unexpected {type(error).__name__}{_place(error)}: {one_line(error)}"
        return _failed(f"{found}; this is a fault of hnf-attention, please report what --debug adds", debug)


def _failed(message: str, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"hnf-attention: {message}", file=sys.stderr)
    return USAGE


def _place(error: Exception) -> str:
    """' in FILE, line N' of the last line of this package that the error passed, or nothing."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(_PACKAGE):
            return f" in {path.relative_to(_PACKAGE)}, line {frame.lineno}"
    return ""
