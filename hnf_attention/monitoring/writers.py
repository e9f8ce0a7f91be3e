"""What a monitor hands its diagnoses to."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from ..diagnosis import AttentionDiagnosis


class DiagnosisWriter(Protocol):
    """What a monitor needs of a writer; a `close()` without arguments is called if there is one."""

    def write(self, diagnosis: AttentionDiagnosis, /) -> object:
        """Take a diagnosis."""


Writer = DiagnosisWriter | Callable[[AttentionDiagnosis], object]


class WriterPart(NamedTuple):
    """A writer as a part of the monitor, with the name that it has in the log."""

    name: str
    write: Callable[[AttentionDiagnosis], object]
    close: Callable[[], object]


def writer_part(number: int, writer: Writer) -> WriterPart:
    """The part for a writer. Raises TypeError for something that takes no diagnosis."""
    write = getattr(writer, "write", writer)
    if not callable(write):
        raise TypeError(f"expected writers with a write(diagnosis) method, or callables, got {writer!r}")
    name = f"writer {number} ({type(writer).__name__})"
    return WriterPart(name, write, getattr(writer, "close", lambda: None))
