"""Judging the check before step 0: does its verdict predict which runs attention will harm?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from hnf_attention import check_attention_stability

from .batches import Batches
from .harm import HARMED
from .metrics import auroc
from .model import GPT
from .recipes import Recipe


def ratios(recipe: Recipe) -> dict[str, float]:
    """sigma / sigma_c of a recipe, from its configuration alone and with one forward of its first batch."""
    design = recipe.design()
    alone = check_attention_stability(config=design)
    inputs, _ = Batches([recipe], 1, torch.device("cpu")).at(0)
    measured = check_attention_stability(GPT(recipe), inputs[0, :2], design)
    return {"configuration": alone["sigma_ratio"], "one forward": measured["sigma_ratio"]}


def table(recipes: Sequence[Recipe], harms: Sequence[float]) -> list[str]:
    """AUROC for harm of each number that is known before the first step."""
    found = [ratios(recipe) for recipe in recipes]
    harmed = np.asarray(harms) >= HARMED
    lines = []
    for source in ("configuration", "one forward"):
        values = np.array([each[source] for each in found])
        rates = np.array([recipe.rate for recipe in recipes])
        lines.append(
            f"check, {source}: AUROC of sigma ratio {auroc(values, harmed):.3f}, "
            f"of sigma ratio x rate {auroc(values * rates, harmed):.3f}"
        )
    return lines
