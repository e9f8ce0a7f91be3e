"""Where a command's output goes: the console, documents, figures."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from ..errors import InputError

_LOG_WIDTH = 140  # columns


class _Screen(Console):
    """A console that leaves it to `main` to end the program when its reader has left; rich would exit with code 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console(stream: TextIO) -> Console:
    """A console as wide as the terminal; in a file or a CI log, wide enough for every table."""
    found = _Screen(file=stream)
    if not found.is_terminal:
        found.width = _LOG_WIDTH
    return found


def for_people(target: str | None) -> Console:
    """The console of a command that writes a document: standard error if the document takes standard output."""
    return console(sys.stderr if target == "-" else sys.stdout)


def check_target(target: str | None, option: str) -> None:
    """Raise InputError, before any work is done, if the file cannot be written later. None and "-" pass."""
    if target in (None, "-"):
        return
    path = Path(target)
    if not path.parent.is_dir():
        raise InputError(f"expected {option} in an existing folder, got {path}")
    place = path if path.exists() else path.parent
    if path.is_dir() or not os.access(place, os.W_OK):
        raise InputError(f"expected {option} to be a file that can be written, got {path}")


def check_figure(target: str | None, option: str) -> None:
    """`check_target` of a figure: its name has to end in a format that can be drawn."""
    if target is None:
        return
    from matplotlib.backend_bases import FigureCanvasBase  # slow to import, and rarely needed

    formats = FigureCanvasBase.get_supported_filetypes()
    if Path(target).suffix.removeprefix(".").lower() not in formats:
        raise InputError(f"expected {option} to end in one of .{', .'.join(sorted(formats))}, got {target}")
    check_target(target, option)


def make_folder(folder: Path) -> None:
    """Make the folder if it is missing. Raises InputError, before any work is done, if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"cannot write to {folder}: its permissions forbid it")


def write_document(target: str | None, document: dict[str, Any]) -> None:
    """Write strict JSON to a file, or to standard output for "-"; None writes nothing."""
    if target is None:
        return
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    try:
        Path(target).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}") from error
