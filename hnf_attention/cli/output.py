"""Where a command's output goes: the console, documents, pages, figures."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from io import TextIOWrapper
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console

from ..errors import InputError
from .paths import exists, is_folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STANDARD = "-"  # in the place of a file: standard output
_LOG_WIDTH = 140  # columns


class _Screen(Console):
    """A console that leaves it to `main` to end the program when its reader has left; rich would exit with code 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console(stream: TextIO) -> Console:
    """A console as wide as the terminal; in a file or a CI log, wide enough for every table.

    Characters that the stream's encoding lacks become question marks.
    """
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(errors="replace")
    found = _Screen(file=stream)
    if not found.is_terminal:
        found.width = _LOG_WIDTH
    return found


def for_people(*targets: str | None) -> Console:
    """The console of a command that writes to these targets: standard error if one of them is standard output."""
    return console(sys.stderr if STANDARD in targets else sys.stdout)


def shown(target: str) -> str:
    """What a message calls the target."""
    return "standard output" if target == STANDARD else target


def check_targets(targets: Mapping[str, str | None], inputs: Iterable[str | Path | None] = ()) -> None:
    """Raise InputError, before any work is done, unless every target can be written later, each in a place of its own.

    targets: by option; None is not written, and "-" is standard output, for one of them.
    inputs: files that the command reads. None of them may be a target.
    """
    given = {option: target for option, target in targets.items() if target is not None}
    for option, target in given.items():
        if target != STANDARD:
            _check_file(Path(target), option)
    for (option, target), (other, its) in combinations(given.items(), 2):
        if _same(target, its):
            raise InputError(f"expected {option} and {other} in two places, got {shown(target)} for both")
    for path in inputs:
        for option, target in given.items():
            if path is not None and target != STANDARD and _same(target, path):
                raise InputError(
                    f"expected {option} to be another file than the one that is read, got {target}"
                )


def _check_file(path: Path, option: str) -> None:
    if not is_folder(path.parent):
        raise InputError(f"expected {option} in an existing folder, got {path}")
    place = path if exists(path) else path.parent
    if is_folder(path) or not os.access(place, os.W_OK):
        raise InputError(f"expected {option} to be a file that can be written, got {path}")


def _same(target: str, other: str | Path) -> bool:
    if STANDARD in (target, other):
        return target == other
    one, two = Path(target), Path(other)
    return one.samefile(two) if exists(one) and exists(two) else one.resolve() == two.resolve()


def check_figure(target: str | None, option: str) -> None:
    """Raise InputError for a name that ends in no format that can be drawn. None and "-" pass."""
    if target in (None, STANDARD):
        return
    from matplotlib.backend_bases import FigureCanvasBase  # slow to import, and rarely needed

    formats = FigureCanvasBase.get_supported_filetypes()
    if Path(target).suffix.removeprefix(".").lower() not in formats:
        raise InputError(f"expected {option} to end in one of .{', .'.join(sorted(formats))}, got {target}")


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
    if target == STANDARD:
        sys.stdout.write(text)  # ASCII, which every stream takes
    else:
        _write_file(target, text)


def write_page(target: str, text: str) -> None:
    """Write UTF-8 text to a file, or to standard output for "-". Raises InputError if the file cannot be written."""
    if target == STANDARD:
        _to_standard_output(text.encode())
    else:
        _write_file(target, text)


def _write_file(target: str, text: str) -> None:
    try:
        Path(target).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}") from error


def write_figure(target: str, axes: Axes) -> None:
    """Write the figure of these axes in the format of its name, or as PNG to standard output for "-".

    Raises InputError if the file cannot be written.
    """
    from ..figures.canvas import png, save

    if target == STANDARD:
        _to_standard_output(png(axes))
        return
    try:
        save(axes, target)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}") from error


def _to_standard_output(data: bytes) -> None:
    """As they are: the stream's own encoding may lack characters of a page, and it may end lines in another way."""
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
