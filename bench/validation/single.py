"""Training the plain model of one recipe, step by step, so that a fix can be applied between two steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batches import Batches
from .model import GPT
from .optimizers import optimizers_of
from .recipes import Recipe


class Training:
    """A run of a recipe that can be stopped and changed.

    losses: of the steps so far. Each parameter group's rate is the recipe's, times the group's "initial_lr", which is 1
    at first. A cut of the rates by `apply_intervention` lowers it.
    """

    def __init__(self, recipe: Recipe, device: torch.device | str = "cpu") -> None:
        self.recipe, self.device = recipe, torch.device(device)
        self.model: nn.Module = GPT(recipe).to(self.device)
        self.optimizers: Sequence[torch.optim.Optimizer] = optimizers_of(self.model, recipe)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["initial_lr"] = 1.0
        self.losses: list[Tensor] = []
        self._rates = recipe.rates().tolist()
        self._batches = Batches([recipe], recipe.steps, self.device)
        low = recipe.precision.split()[0]
        self._low = None if low == "float32" else getattr(torch, low)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.precision == "float16 scaled")

    @property
    def step(self) -> int:
        """How many steps were done."""
        return len(self.losses)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The one that has the parameters which Muon does not take."""
        return self.optimizers[-1]

    def cut_rates(self, factor: float) -> None:
        """Multiply the rates of all parameters from now on."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["initial_lr"] = group.get("initial_lr", 1.0) * factor

    def went_back(self, step: int) -> None:
        """Go on from that step, whose state the caller has restored, with batches that were not seen before."""
        del self.losses[step:]
        fresh = replace(self.recipe, seed=self.recipe.seed + 1)
        self._batches = Batches([fresh], self.recipe.steps, self.device)

    def advance(self) -> None:
        """Train one step."""
        number = self.step
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._rates[number] * group.setdefault("initial_lr", 1.0)
        inputs, targets = (part[0] for part in self._batches.at(number))
        with torch.autocast(self.device.type, dtype=self._low, enabled=self._low is not None):
            logits = self.model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()
        for optimizer in self.optimizers:
            self._scaler.unscale_(optimizer)
        if self.recipe.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        for optimizer in self.optimizers:
            self._scaler.step(optimizer)
        self._scaler.update()
        self.losses.append(loss.detach())

    def loss_array(self) -> np.ndarray:
        """The losses so far, float32 (steps,)."""
        return torch.stack(self.losses).cpu().numpy() if self.losses else np.empty(0, np.float32)
