"""The batches of the members of an ensemble, or of one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from .recipes import Recipe
from .text import VOCABULARY, starts, text

EVENT_STEPS = 5  # how long a bad batch lasts


class Batches:
    """The batches of every member: windows of its own text, drawn by its own seed."""

    def __init__(
        self, members: Sequence[Recipe], steps: int, device: torch.device, held_out: bool = False
    ) -> None:
        kinds = sorted({each.data for each in members})
        texts = [text(kind, held_out) for kind in kinds]
        at = dict(zip(kinds, np.cumsum([0, *map(len, texts[:-1])]).tolist()))
        self._text = torch.cat(texts).to(device)
        drawn = [
            at[x.data] + starts(x.seed, steps, x.batch, len(texts[kinds.index(x.data)]), x.context)
            for x in members
        ]
        self._starts = torch.stack(drawn, 1).to(device)  # (steps, E, B)
        self._offsets = torch.arange(members[0].context + 1, device=device)
        self._members = members if not held_out else [replace(x, event="", label_noise=0.0) for x in members]
        self._targets = {n: x for n, x in enumerate(self._members) if x.label_noise}
        self._events = {n: x for n, x in enumerate(self._members) if x.event in ("bad batch", "tied keys")}
        # Drawn once, by each member's own seed, so that a twin has the same and no step waits for a copy.
        noise = [self._noise(x, steps) for x in self._targets.values()]
        self._noisy = torch.stack([chosen for chosen, _ in noise], 1).to(device) if noise else None
        self._wrong = torch.stack([wrong for _, wrong in noise], 1).to(device) if noise else None

    @staticmethod
    def _noise(recipe: Recipe, steps: int) -> tuple[Tensor, Tensor]:
        """Which targets are wrong, bool (steps, B, N), and the bytes in their place, uint8."""
        generator = torch.Generator().manual_seed(recipe.seed + 1)
        shape = steps, recipe.batch, recipe.context
        chosen = torch.rand(shape, generator=generator) < recipe.label_noise
        return chosen, torch.randint(VOCABULARY, shape, generator=generator, dtype=torch.uint8)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 (E, B, N) each."""
        windows = self._text[self._starts[step][..., None] + self._offsets].long()
        for number, each in self._events.items():
            if each.event_step <= step + 1 < each.event_step + EVENT_STEPS:
                if each.event == "tied keys":
                    windows[number] = each.seed % VOCABULARY
                else:
                    generator = torch.Generator().manual_seed(each.seed + step)
                    random = torch.randint(VOCABULARY, windows[number].shape, generator=generator)
                    windows[number] = random.to(windows.device)
        targets = windows[..., 1:].clone()
        if self._noisy is not None:
            chosen = list(self._targets)
            targets[chosen] = torch.where(self._noisy[step], self._wrong[step].long(), targets[chosen])
        return windows[..., :-1], targets
