"""What a command is doing, shown on a terminal while it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress

from .output import console

# (what is being done, how much of it, of how much); both numbers are None while something is loaded.
Progress = Callable[[str, "int | None", "int | None"], None]


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """What is being done, on standard error; nothing if that is no terminal."""
    screen = console(sys.stderr)
    columns = (
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}"),
        progress.TimeElapsedColumn(),
    )
    with progress.Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as shown:
        task = shown.add_task("starting", total=None)

        def show(doing: str, done: int | None, total: int | None) -> None:
            text = doing if total is None else f"{doing}: {done} of {total}"
            shown.update(task, description=text)

        yield show
