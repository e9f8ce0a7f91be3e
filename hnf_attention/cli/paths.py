"""Looks at paths that commands are given; one that the system refuses to look up is the user's to put right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError

_LONGEST = 80  # characters of a name that a message shows


def is_file(path: Path) -> bool:
    """Whether a file is there. Raises InputError if that cannot be told."""
    with _looking_at(path):
        return path.is_file()


def is_folder(path: Path) -> bool:
    """Whether a folder is there. Raises InputError if that cannot be told."""
    with _looking_at(path):
        return path.is_dir()


def exists(path: Path) -> bool:
    """Whether anything is there. Raises InputError if that cannot be told."""
    with _looking_at(path):
        return path.exists()


@contextmanager
def _looking_at(path: Path) -> Iterator[None]:
    """A name may be too long, and a folder on the way may be closed to this user."""
    try:
        yield
    except OSError as error:
        name = str(path)
        shown = name if len(name) <= _LONGEST else f"{name[:_LONGEST]}... ({len(name)} characters)"
        raise InputError(
            f"expected a file, a folder or a name that can be looked up, got {shown}: {error.strerror}"
        ) from error
