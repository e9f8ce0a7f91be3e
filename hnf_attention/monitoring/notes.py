"""What a monitor is told beside its own measurements, for writers that keep it: losses, and what was done."""

from __future__ import annotations

import logging
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..errors import let_out
from ..instrumentation.sharded import is_sharded
from ..interventions import Applied
from ..tracing import captured, without_dispatch_modes

_log = logging.getLogger("hnf_attention")

#: Training steps whose numbers wait for a log step. Past that the oldest are given up.
MOST_STEPS = 100_000


@runtime_checkable
class NoteWriter(Protocol):
    """A writer that keeps more than diagnoses; `hnf_attention.run_log.RunLogWriter` is one."""

    def note(self, step: int, **scalars: float) -> None:
        """Take numbers of a training step."""

    def event(self, step: int, kind: str, **detail: Any) -> None:
        """Take something that happened."""


class Notes:
    """Numbers of training steps, without a wait for the device before the next log step."""

    def __init__(self, writers: Iterable[object]) -> None:
        self._kept: deque[tuple[int, str, float | Tensor]] = deque(maxlen=MOST_STEPS)
        self._process = os.getpid()
        self._writers = [writer for writer in writers if isinstance(writer, NoteWriter)]
        self._told: dict[int, int] = {}  # sentences that were handed on, by the intervention's id
        # At the end of the process, too, writers get what was kept. They were made before, so theirs comes later.
        # Weak, because a writer may hold the monitor, which would then live as long as the process.
        weakref.finalize(self, _call, weakref.WeakMethod(self.end))

    def __del__(self) -> None:
        # Not by a weak reference: the garbage collector clears those within a reference cycle before all else.
        self.end()

    def end(self) -> None:
        """`hand_over` of a monitor that is dropped; whatever fails then is logged.

        A process that was forked from the monitor's ends without a word: the losses are the other one's.
        """
        if not self._kept or os.getpid() != self._process:
            return
        try:
            if captured() and any(isinstance(value, Tensor) and value.is_cuda for _, _, value in self._kept):
                raise RuntimeError("the garbage collector ran within the capture of a CUDA graph")
            with without_dispatch_modes():  # of whatever the garbage collector interrupts
                self.hand_over()
        except Exception:
            _log.warning("the losses since the last log step are lost", exc_info=True)

    def keep(self, step: int, values: Mapping[str, float | Tensor | None]) -> None:
        """Keep numbers or 0-dimensional tensors of a step; None for one that is not known.

        Raises TypeError or ValueError for what is no single number.
        """
        for name, value in values.items():
            if value is None:
                continue
            if is_sharded(value):
                raise TypeError(
                    f"expected {name} as a tensor of this process, got a DTensor: give {name}.full_tensor()"
                )
            if isinstance(value, Tensor):
                if value.numel() != 1:
                    raise ValueError(
                        f"expected {name} to be one number, got a tensor of shape {tuple(value.shape)}"
                    )
                # A copy: the next replay of a CUDA graph, or a division in place, writes over it.
                value = value.detach().reshape(()).clone() if self._writers else 0.0
            elif not isinstance(value, (int, float)):
                raise TypeError(f"expected {name} to be a number or a tensor, got {type(value).__name__}")
            if self._writers:
                self._kept.append((step, name, value))

    def hand_over(self) -> None:
        """Give the writers what was kept: one copy from each device. Raises the first error of a writer, at the end."""
        kept, values = list(self._kept), dict[int, float]()
        self._kept.clear()
        by_device: dict[torch.device, dict[int, Tensor]] = {}
        for place, (_, _, value) in enumerate(kept):
            if isinstance(value, Tensor):
                by_device.setdefault(value.device, {})[place] = value.float()
        for found in by_device.values():
            values.update(zip(found, torch.stack(list(found.values())).tolist()))

        def tell(writer: NoteWriter) -> None:
            for place, (step, name, value) in enumerate(kept):
                writer.note(step, **{name: values[place] if place in values else float(value)})

        self._tell(tell)

    def account(self, step: int, applied: Iterable[Applied]) -> None:
        """Give the writers each new sentence of the accounts of interventions. applied: all of them.

        Raises the first error of a writer, at the end.
        """
        if not self._writers:
            return
        told, news = {}, []
        for each in applied:
            detail = {"action": str(each.intervention["action"]), "outcome": each.outcome}
            news += [{**detail, "text": text} for text in each.account[self._told.get(id(each), 0) :]]
            told[id(each)] = len(each.account)
        self._told = told

        def tell(writer: NoteWriter) -> None:
            for detail in news:
                writer.event(step, "intervention", **detail)

        self._tell(tell)

    def _tell(self, tell: Callable[[NoteWriter], None]) -> None:
        """Tell every writer: one that fails keeps nothing from the others."""
        errors = []
        for writer in self._writers:
            try:
                tell(writer)
            except Exception as error:
                let_out(error)
                errors.append(error)
        if errors:
            raise errors[0]


def _call(method: weakref.WeakMethod[Callable[[], None]]) -> None:
    alive = method()
    if alive is not None:
        alive()
