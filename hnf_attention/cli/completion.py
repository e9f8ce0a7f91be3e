"""Scripts that complete commands, options and file names in a shell, made by shtab."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from ..errors import InputError

# Metavars of options and arguments that name a file or a folder.
_FILES = ("CONFIG_OR_MODEL", "FILE", "MODEL", "PATH", "RUN", "TARGET")
_FOLDERS = ("DIR",)


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for that shell. Raises InputError if shtab is not installed."""
    try:
        import shtab
    except ImportError as error:
        raise InputError("expected shtab to be installed; pip install 'hnf-attention[completion]'") from error
    for action in _actions(parser):
        if action.metavar in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.metavar in _FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    script: str = shtab.complete(parser, shell)
    return script


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Those of all commands."""
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for command in action.choices.values():
                yield from _actions(command)
        else:
            yield action
