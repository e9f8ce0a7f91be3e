"""What a monitor hands its diagnoses to."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Protocol

from ..diagnosis import AttentionDiagnosis
from ..errors import let_out

_log = logging.getLogger("hnf_attention")

#: Diagnoses that wait for a writer that fails. Past that the oldest is given up.
MOST_WAITING = 128


class DiagnosisWriter(Protocol):
    """What a monitor needs of a writer; a `close()` without arguments is called if there is one."""

    def write(self, diagnosis: AttentionDiagnosis, /) -> object:
        """Take a diagnosis."""


Writer = DiagnosisWriter | Callable[[AttentionDiagnosis], object]


class WriterPart:
    """A writer as a part of the monitor: a diagnosis that it does not take now waits, and keeps its place.

    name: that it has in the log. close: of the writer.
    """

    def __init__(
        self, name: str, write: Callable[[AttentionDiagnosis], object], close: Callable[[], object]
    ) -> None:
        self.name, self.close = name, close
        self._write = write
        self._waiting: deque[AttentionDiagnosis] = deque()
        self._attempts = 0  # at the oldest one
        self._lost = 0

    def take(self, diagnosis: AttentionDiagnosis) -> None:
        """Have the diagnosis wait for `write`."""
        self._waiting.append(diagnosis)
        if len(self._waiting) > MOST_WAITING:
            self._give_up()

    def write(self) -> None:
        """Hand the writer all that waits, oldest first. Raises what the writer raises: the rest waits on."""
        while self._waiting:
            try:
                self._write(self._waiting[0])
            except Exception as error:
                let_out(error)
                self._attempts += 1
                if self._attempts < 2 or len(self._waiting) < 2:
                    raise
                self._write(self._waiting[1])
                # The writer works, and does not take the oldest one.
                self._give_up()
            self._waiting.popleft()
            self._attempts = 0
        if self._lost:
            _log.warning("%s missed %d of the log steps before", self.name, self._lost)
            self._lost = 0

    def end(self) -> None:
        """A last attempt, and what it left. Nothing is raised but the error of a signal."""
        try:
            self.write()
        except Exception as error:
            let_out(error)
            _log.warning("%s ends with %d log steps that it did not take", self.name, len(self._waiting))

    def _give_up(self) -> None:
        self._waiting.popleft()
        self._attempts = 0
        self._lost += 1


def writer_part(number: int, writer: Writer) -> WriterPart:
    """The part for a writer. Raises TypeError for something that takes no diagnosis."""
    write = getattr(writer, "write", writer)
    if not callable(write):
        raise TypeError(f"expected writers with a write(diagnosis) method, or callables, got {writer!r}")
    name = f"writer {number} ({type(writer).__name__})"
    return WriterPart(name, write, getattr(writer, "close", lambda: None))
