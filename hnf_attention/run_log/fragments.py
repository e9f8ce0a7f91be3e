"""A run log where no database may lie: one text file for each process that writes, a line of JSON a log step."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import database
from .blocks import BadLog
from .records import Record

FORMAT = 1
_LONGEST = 1 << 28  # bytes of a line; a longer one is refused before memory is taken for it


def folder_of(path: Path) -> Path:
    """Where the fragments of a run log lie: run.db.fragments beside run.db."""
    return path.with_name(f"{path.name}.fragments")


class Fragment:
    """One process's file. Its first line says who wrote it, and each further line is a log step."""

    def __init__(self, path: Path, uid: str, started: float, about: Mapping[str, Any]):
        self.path = folder_of(path) / f"{uid}.jsonl"
        # Clocks of machines differ, and jump: a run that was resumed comes after all files that it found.
        order = sum(1 for _ in folder_of(path).glob("*.jsonl"))
        self._head = {"format": FORMAT, "uid": uid, "order": order, "started": started, "about": about}

    def active_before(self, step: int) -> list[dict[str, Any]]:
        """Nothing: what other processes wrote is not read here."""
        return []

    def shrink(self, max_bytes: int) -> None:
        """Nothing: a text file is only appended to."""

    def close(self) -> None:
        """Nothing: each log step opens the file anew."""

    def add(self, number: int, record: Record) -> None:
        """Append a log step as one write, and have it on its way to the disk. Raises OSError."""
        lines = [{"number": number} | record.to_json()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            start = file.tell()
            if start == 0:
                lines.insert(0, self._head)
            data = "".join(f"{json.dumps(line, allow_nan=False)}\n" for line in lines).encode()
            try:
                if file.write(data) != len(data):
                    raise OSError(f"cannot write {self.path}: there is no room")
                os.fsync(file.fileno())
            except OSError:
                file.truncate(start)  # no half line is left for the next one to follow
                raise


def gather(path: Path, connection: sqlite3.Connection) -> int:
    """Add all fragments of a run log to a database, those that it has already left out. Returns how many log steps
    it took in.

    A line that a crash cut short is left out. Raises BadLog for a file that is no fragment, or OSError.
    """
    count = 0
    opened = sorted(
        (_opened(file) for file in folder_of(path).glob("*.jsonl")),
        key=lambda each: (each[0]["order"], each[0]["started"]),
    )
    for head, lines in opened:
        session = database.begin_session(connection, head["uid"], head["started"], head["about"])
        for number, record in lines:
            database.add(connection, session, number, record)
            count += 1
    return count


def _opened(path: Path) -> tuple[dict[str, Any], Iterator[tuple[int, Record]]]:
    with path.open("rb") as file:
        head = _parsed(file.readline(_LONGEST))
    try:
        if head is None or head["format"] != FORMAT:
            raise KeyError("format")
        about = {
            "uid": str(head["uid"]),
            "order": int(head.get("order", 0)),  # older files have none
            "started": float(head["started"]),
            "about": dict(head["about"]),
        }
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BadLog(f"expected a fragment of a run log of format {FORMAT}, got {error!r}: {path}") from None
    return about, _records(path)


def _records(path: Path) -> Iterator[tuple[int, Record]]:
    with path.open("rb") as file:
        file.readline(_LONGEST)
        while line := file.readline(_LONGEST):
            found = _parsed(line)
            if found is None:
                continue
            try:
                record = Record.of_json(found)
                json.dumps(
                    found, ensure_ascii=False
                ).encode()  # a half of a character is no text for a database
                yield min(int(found["number"]), 1 << 53), record
            except (KeyError, TypeError, ValueError, OverflowError):
                continue


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
