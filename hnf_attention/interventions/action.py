"""What every treatment can do: say what it would change, change it, compare with the next reading, change it back."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch

from ..statistics.heads import HeadStats

_log = logging.getLogger("hnf_attention")

#: The latest statistics by layer: `AttentionDiagnosis.stats`.
Reading = Mapping[str, HeadStats]


class Preview(NamedTuple):
    """What an action would change. text: in words. numbers: before and after, as JSON types."""

    text: str
    numbers: dict[str, Any]


class Verdict(NamedTuple):
    """Whether a reading shows what an action predicted; None where the reading cannot tell. text: the numbers."""

    holds: bool | None
    text: str


class Action(ABC):
    """One treatment of a run. Making it checks everything that it needs, and changes nothing.

    `apply` and `revert` do nothing the second time. Actions on one run may be combined, and are then to be reverted in
    the opposite order.
    """

    name: ClassVar[str]

    def __init__(self) -> None:
        self._undo: list[Callable[[], Any]] | None = None

    @property
    def applied(self) -> bool:
        """Whether it is in force."""
        return self._undo is not None

    @abstractmethod
    def preview(self) -> Preview:
        """What `apply` would change. Nothing is touched."""

    @abstractmethod
    def verify(self, reading: Reading) -> Verdict:
        """Compare what was predicted with the statistics of a later forward."""

    @abstractmethod
    def _do(self, undo: list[Callable[[], Any]]) -> str:
        """Carry it out. Returns what was done, in words. Adds to `undo`, step by step, what takes it back."""

    def apply(self) -> str:
        """Carry it out, wholly or not at all. Returns what was done, in words."""
        if self._undo is not None:
            return f"{self.name} is in force already"
        undo: list[Callable[[], Any]] = []
        try:
            with torch.no_grad():
                said = self._do(undo)
        except BaseException:
            _run_backwards(undo)
            raise
        self._undo = undo
        _log.info("%s: %s", self.name, said)
        return said

    def revert(self) -> None:
        """Take it back: bit for bit where nothing was learnt since. What is kept otherwise, each action says."""
        undo, self._undo = self._undo, None
        if undo is not None:
            with torch.no_grad():
                _run_backwards(undo)
            _log.info("%s: reverted", self.name)


def _run_backwards(undo: list[Callable[[], Any]]) -> None:
    while undo:
        undo.pop()()
