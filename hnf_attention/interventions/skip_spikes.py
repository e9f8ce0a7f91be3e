"""Leaving out gradients that are far larger than usual."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .action import Preview
from .beside_steps import BesideSteps
from .intervention import check_positive


class SkipSpikes(BesideSteps):
    """Leaves out the gradient of a batch whose norm is far above the usual one, or is not finite.

    The gradient becomes 0 for that step; moments and weight decay go on. The usual norm and its deviation are running
    means over the steps that were not left out, as in ZClip (arXiv 2504.02507). All of it runs on the device. `skipped`
    counts. limit: in deviations. Raises ValueError for wrong items.
    """

    name = "skip_spikes"
    _DECAY, _FIRST = 0.97, 25  # of ZClip

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], intervention: Mapping[str, Any]):
        super().__init__(optimizers)
        self._limit = check_positive("'limit'", intervention.get("limit", 6.0))
        self._state: dict[int, list[Tensor]] = {}

    @property
    def skipped(self) -> int:
        """How many steps were left out; waits for the device."""
        return sum(int(state[3]) for state in self._state.values())

    def preview(self) -> Preview:
        """As `Action.preview`."""
        text = f"gradients with a norm more than {self._limit:g} deviations above the usual one are left out"
        return Preview(text, {"limit": self._limit})

    @torch.no_grad()
    def before(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the gradients to 0 if their norm is a spike."""
        held = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not held:
            return
        norms = [torch.linalg.vector_norm(grad, dtype=torch.float32).to(held[0].device) for grad in held]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        state = self._state.get(id(optimizer))
        if state is None:
            zero = torch.zeros_like(norm)
            state = self._state[id(optimizer)] = [zero, zero.clone(), zero.clone(), zero.clone()]
        mean, square, count, skipped = state
        spread = (square - mean * mean).clamp(min=0).sqrt()
        known = count >= self._FIRST
        spike = ~norm.isfinite() | (known & (norm > mean + self._limit * spread.maximum(0.05 * mean)))
        for grad in held:
            grad.copy_(
                torch.where(
                    spike.to(grad.device), torch.zeros((), dtype=grad.dtype, device=grad.device), grad
                )
            )
        kept = torch.where(count == 0, torch.zeros_like(norm), torch.full_like(norm, self._DECAY))
        for number, value in ((mean, norm), (square, norm * norm)):
            number.copy_(torch.where(spike, number, kept * number + (1 - kept) * value))
        count += ~spike
        skipped += spike

    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """Nothing."""
