"""The epsilon of the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .action import Action, Preview, Reading, Verdict
from .intervention import positive


class SetEpsilon(Action):
    """Sets the epsilon of Adam and its kin. Reverting sets the old one.

    An epsilon near the size of the gradients slows layers with small ones; one far below their noise makes steps of
    full length out of it (arXiv 2309.14322, section 3.4; arXiv 2304.09871).
    Raises ValueError for wrong items, and for optimizers without an epsilon.
    """

    name = "set_eps"

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], intervention: Mapping[str, Any]):
        super().__init__()
        self._eps = positive(intervention, "eps")
        groups = [group for one in optimizers for group in one.param_groups]
        self._groups = [group for group in groups if isinstance(group.get("eps"), float)]
        if not self._groups:
            names = [type(one).__name__ for one in optimizers]
            raise ValueError(f"expected an optimizer with an epsilon for set_eps, got {names or None}")
        self._old = [group["eps"] for group in self._groups]

    def preview(self) -> Preview:
        """As `Action.preview`."""
        old = ", ".join(f"{eps:g}" for eps in dict.fromkeys(self._old))
        return Preview(f"epsilon ({old}) -> {self._eps:g}", {"before": self._old, "after": self._eps})

    def verify(self, reading: Reading) -> Verdict:
        """Whether the number is still there."""
        now = [group["eps"] for group in self._groups]
        return Verdict(all(eps == self._eps for eps in now), f"epsilon is {now[0]:g}, set to {self._eps:g}")

    def _do(self, undo: list[Callable[[], Any]]) -> str:
        undo.append(lambda: self._put(self._old))
        self._put([self._eps] * len(self._groups))
        return self.preview().text

    def _put(self, values: Sequence[float]) -> None:
        for group, eps in zip(self._groups, values):
            group["eps"] = eps
