"""Run logs that commands are given."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from ..run_log import RunLog


def open_log(path: str | Path) -> RunLog:
    """The run log at this path. Raises InputError if there is none, or if it is none."""
    try:
        return RunLog(path)
    except OSError as error:
        raise InputError(f"cannot read the run log {path}: {error.strerror or error}") from error
