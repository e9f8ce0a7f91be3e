"""Actions that stand beside the optimizer: they act just before and just after each of its steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .action import Action, Reading, Verdict


class BesideSteps(Action):
    """Hooks around the steps of optimizers. Reverting ends it; what was trained under it stays.

    Raises ValueError without an optimizer.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]):
        super().__init__()
        if not optimizers:
            raise ValueError(f"expected an optimizer for {self.name}, got None")
        self._optimizers = list(optimizers)
        self._hooks: list[Any] = []

    @abstractmethod
    def before(self, optimizer: torch.optim.Optimizer) -> None:
        """Just before a step."""

    @abstractmethod
    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """Just after it."""

    def verify(self, reading: Reading) -> Verdict:
        """A reading does not show what happens beside a step."""
        return Verdict(None, self.preview().text)

    def _do(self, undo: list[Callable[[], Any]]) -> str:
        undo.append(self._end)
        for one in self._optimizers:
            self._hooks += [
                one.register_step_pre_hook(lambda optimizer, *_: self.before(optimizer)),
                one.register_step_post_hook(lambda optimizer, *_: self.after(optimizer)),
            ]
        return self.preview().text

    def _end(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()
