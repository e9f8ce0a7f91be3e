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
        # Noise is drawn on the CPU in one stream for each seed, so that a twin has the same.
        self._generators = [torch.Generator().manual_seed(each.seed + 1) for each in members]

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 (E, B, N) each."""
        windows = self._text[self._starts[step][..., None] + self._offsets].long()
        for number, each in enumerate(self._members):
            if each.event and each.event_step <= step + 1 < each.event_step + EVENT_STEPS:
                if each.event == "bad batch":
                    windows[number] = self._noise(number, windows[number])
                elif each.event == "tied keys":
                    windows[number] = each.seed % VOCABULARY
        targets = windows[..., 1:].clone()
        for number, each in enumerate(self._members):
            if each.label_noise:
                generator = self._generators[number]
                noisy = torch.rand(targets[number].shape, generator=generator) < each.label_noise
                wrong = torch.randint(VOCABULARY, targets[number].shape, generator=generator)
                noisy, wrong = noisy.to(targets.device), wrong.to(targets.device)
                targets[number] = torch.where(noisy, wrong, targets[number])
        return windows[..., :-1], targets

    def _noise(self, number: int, like: Tensor) -> Tensor:
        return torch.randint(VOCABULARY, like.shape, generator=self._generators[number]).to(like.device)
