"""Writes a run log from a thread of its own: the training thread hands a log step over and goes on."""

from __future__ import annotations

import logging
import os
import platform
import queue
import sqlite3
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from operator import index
from os import PathLike
from pathlib import Path
from typing import Any

from ..diagnosis import AttentionDiagnosis
from ..errors import report
from ..versions import versions
from . import database
from .fragments import Fragment
from .places import network_file_system
from .recording import TOLD, Recording
from .records import Record, plain

_log = logging.getLogger("hnf_attention")

#: Log steps that wait for a disk that is full or away. Past that the oldest are given up.
MOST_WAITING = 256
#: Bytes of a file, past which older log steps are joined in pairs.
MOST_BYTES = 2 << 30
#: What waits for the thread: log steps, numbers of training steps, events.
MOST_IN_LINE = 200_000
#: Log steps among it. Each holds the statistics of all heads: 400 KB at 400 heads.
MOST_LOG_STEPS_IN_LINE = 1024
#: Errors that pass: a disk that is full or away, a file that another process uses.
_LATER = OSError, sqlite3.OperationalError
_PATIENCE = 10.0  # seconds that `close` and the end of the process wait for the thread


class RunLogWriter:
    """Writes everything that a monitor sees into one file: a writer for `AttentionStabilityMonitor(writers=[...])`.

    path: of an SQLite database, such as "run.db"; a run that was resumed goes on in the same file. Each log step is one
    transaction, so a crash loses none that was written, and `RunLog(path)` reads while the run goes on. On a network
    file system, where SQLite's write-ahead log is not safe, each process appends to a file of its own in
    "run.db.fragments" instead; `RunLog(path)` reads these as well.
    about: JSON types that describe the run, such as the model's configuration; stored as they are.
    max_bytes: past this size older log steps are joined in pairs: maxima and minima are kept, means are averaged.

    A disk that is full or away costs no training step: log steps wait in memory, and one line is logged.
    Raises BadLog for a file that is no run log, OSError for one that cannot be written, ValueError for a bad max_bytes,
    TypeError for an `about` that is no mapping.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        about: Mapping[str, Any] | None = None,
        max_bytes: int = MOST_BYTES,
    ):
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
            raise ValueError(f"expected max_bytes to be an int >= 1, got {max_bytes!r}")
        if about is not None and not isinstance(about, Mapping):
            raise TypeError(f"expected about to be a dict, got {type(about).__name__}")
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._about = plain({"run": dict(about or {}), "environment": _environment()})
        self._max_bytes = max_bytes
        self._running: list[_Thread] = []  # none after `close`
        self._end: weakref.finalize | None = None
        self._thread: _Thread
        self._open()

    def _open(self) -> None:
        # In a reference cycle that holds a monitor and this writer, the writer ends first: it goes on for the monitor's
        # last numbers, and ends again.
        ended = self._thread if self._end is not None and not self._end.alive else None
        self._thread = _Thread(self.path, self._about, self._max_bytes, ended)
        self._running.append(self._thread)
        # At the end of the process, too, what waits is written. What was made first ends last: monitors, which hand
        # over their last numbers at their own end, come before this writer, also if an earlier one has closed it.
        if self._end is None or not self._end.alive:
            self._end = weakref.finalize(self, _finish, self._running)

    def _take(self, item: tuple[Any, ...]) -> None:
        if not self._running:  # closed by an earlier monitor
            self._open()
        self._thread.take(item)

    def __repr__(self) -> str:
        thread = self._thread
        waiting = thread.waiting.qsize() + len(thread.kept)
        return f"RunLogWriter({str(self.path)!r}): {thread.written} log steps written, {waiting} waiting"

    def write(self, diagnosis: AttentionDiagnosis) -> None:
        """Take one log step in. Raises nothing: the thread says what goes wrong."""
        # The snapshots before the latest one would live as long as the line.
        self._take(("diagnosis", replace(diagnosis, history=diagnosis.history[-1:]), time.time()))

    def note(self, step: int, **scalars: float) -> None:
        """Keep numbers of a training step, such as loss=2.3; written with the next log step, or at the end."""
        self._take(("scalars", index(step), {name: float(value) for name, value in scalars.items()}))

    def event(self, step: int, kind: str, **detail: Any) -> None:
        """Keep something that happened, such as an intervention; written with the next log step, or at the end.

        Raises ValueError for the kinds that a log step tells by itself, "issue" and "thresholds".
        """
        if kind in TOLD:
            raise ValueError(f"expected another kind of event than {' and '.join(TOLD)}, got {kind!r}")
        self._take(("event", index(step), {"kind": kind, "step": index(step)} | plain(detail)))

    def flush(self, timeout: float = _PATIENCE) -> bool:
        """Wait until every log step that was taken is written. Returns whether it is."""
        return self._thread.flush(timeout)

    def close(self) -> None:
        """Write what waits and end the thread. A second call does nothing; a later `write` goes on in the same file."""
        _finish(self._running)


def _finish(running: list[_Thread]) -> None:
    while running:
        running.pop().finish(_PATIENCE)


class _Thread(threading.Thread):
    """waiting: what was handed over. kept: records that could not be written yet, with their numbers.

    ended: the thread whose session goes on; None for a session of its own.
    """

    def __init__(
        self, path: Path, about: Mapping[str, Any], max_bytes: int, ended: _Thread | None = None
    ) -> None:
        super().__init__(name="hnf-attention run log", daemon=True)
        self.waiting: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self.kept: deque[tuple[int, Record]] = deque()
        self.written = 0
        self._lost = self._missed = 0
        self._given = self._taken = 0  # log steps that were put in the line, and taken out of it
        self._process = os.getpid()
        self._failed: str | None = None
        self._left_out = False  # whether the last attempt left a log step out
        self._max_bytes = max_bytes
        self._recording, self._number = Recording(), 0
        self._session = uuid.uuid4().hex, time.time()
        if ended is not None and not ended.is_alive():
            self._recording, self._number, self._session = ended._recording, ended._number, ended._session
        uid, started = self._session
        kind = network_file_system(path.parent)
        self._sink: _Database | Fragment
        if kind is None:
            self._sink = _Database(path, uid, started, about)
        else:
            self._sink = Fragment(path, uid, started, about)
            _log.info("the run log %s lies on %s, so it is written as %s", path, kind, self._sink.path)
        self.start()

    def take(self, item: tuple[Any, ...]) -> None:
        if not self.is_alive() or os.getpid() != self._process:  # a forked process has no such thread
            return
        # A disk that hangs raises nothing, and the memory has a bound.
        full = self.waiting.qsize() >= MOST_IN_LINE
        if item[0] == "diagnosis":
            full |= self._given - self._taken >= MOST_LOG_STEPS_IN_LINE
            self._given += not full
        if not full or item[0] in ("flush", "end"):
            self.waiting.put(item)
            return
        self._missed += 1
        if self._missed == 1:
            _log.warning("the run log is not written now (its disk hangs); new log steps are left out")

    def flush(self, timeout: float) -> bool:
        done = threading.Event()
        self.take(("flush", done))
        return self.is_alive() and done.wait(timeout) and not self.kept

    def finish(self, timeout: float) -> None:
        self.take(("end",))
        if os.getpid() == self._process:
            self.join(timeout)

    def run(self) -> None:
        while True:
            kind, *rest = self.waiting.get()
            try:
                if kind == "diagnosis":
                    self._taken += 1
                    if self._number == 0:
                        self._know(rest[0].step)
                    self._number += 1
                    self.kept.append((self._number, self._recording.record(*rest)))
                    self._write()
                elif kind == "scalars":
                    self._recording.note(*rest)
                elif kind == "event":
                    self._recording.happened(rest[1])
                elif kind == "flush":
                    self._write()
                    rest[0].set()
                else:
                    break
            except Exception:
                # Whatever is wrong with one log step, the next ones are written.
                self._leave_out("a log step")
        try:
            record = self._recording.rest(time.time())
            if record is not None:
                self._number += 1
                self.kept.append((self._number, record))
            self._write()
            self._sink.close()
        except Exception:
            self._leave_out("what came after the last log step")
        if self.kept:
            _log.warning("the run log ends with %d log steps that could not be written", len(self.kept))

    def _know(self, step: int) -> None:
        """Take in the issues of an earlier session. Without them, they are new ones: no log step is lost for that."""
        try:
            self._recording.know(self._sink.active_before(step))
        except Exception as error:
            report("the issues before this log step could not be read, and count as new", error)

    def _leave_out(self, what: str) -> None:
        """Say that something is not written: once, until something is."""
        if not self._left_out:
            _log.warning("the run log leaves %s out", what, exc_info=True)
        self._left_out = True

    def _add(self, number: int, record: Record) -> None:
        try:
            self._sink.add(number, record)
            self.written += 1
            self._left_out = False
        except _LATER:
            raise
        except Exception:
            # Another attempt would end the same way.
            self._leave_out(f"log step {record.step}")

    def _write(self) -> None:
        try:
            while self.kept:
                self._add(*self.kept[0])
                self.kept.popleft()
        except _LATER as error:
            while len(self.kept) > MOST_WAITING:
                self.kept.popleft()
                self._lost += 1
            if self._failed is None:
                _log.warning("the run log cannot be written now (%s); log steps wait in memory", error)
            self._failed = str(error)
            return
        if self._failed is not None:
            lost = f"; {self._lost} log steps were lost" if self._lost else ""
            _log.warning("the run log is written again%s", lost)
            self._failed, self._lost = None, 0
        if self._missed:
            _log.warning("the run log is written again; %d items were left out", self._missed)
            self._missed = 0
        try:
            self._sink.shrink(self._max_bytes)
        except Exception as error:
            report("the run log could not be made smaller", error)


class _Database:
    """The file as an SQLite database, with a session of this process."""

    def __init__(self, path: Path, uid: str, started: float, about: Mapping[str, Any]):
        self._connection = database.connect(path)
        self._session = database.begin_session(self._connection, uid, started, about)

    def active_before(self, step: int) -> list[dict[str, Any]]:
        """The issues that an earlier session had at its last log step before this one."""
        return database.active_issues(self._connection, step - 1)

    def add(self, number: int, record: Record) -> None:
        database.add(self._connection, self._session, number, record)

    def shrink(self, max_bytes: int) -> None:
        """Join older log steps while the file is too large, a few at a time."""
        if database.size(self._connection) > max_bytes:
            database.thin(self._connection)

    def close(self) -> None:
        self._connection.close()


def _environment() -> dict[str, Any]:
    return {
        "versions": versions("hnf-attention", "torch", "triton", "transformers", "numpy"),
        "machine": platform.node(),
        "system": platform.platform(),
        "process": os.getpid(),
    }
