"""Judging the check before step 0: does its verdict predict which runs attention will harm?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from hnf_attention import check_attention_stability
from hnf_attention.precheck.rates import CLEAN_ODDS

from .batches import Batches
from .harm import HARMED
from .metrics import auroc, share
from .model import GPT
from .recipes import Recipe


def numbers(recipe: Recipe) -> dict[str, float]:
    """What the check says of a recipe, from its configuration alone and with one forward of its first batch."""
    design = recipe.design()
    plan = {"learning_rate": recipe.rate, "warmup": recipe.warmup}
    alone = check_attention_stability(config=design, **plan)
    inputs, _ = Batches([recipe], 1, torch.device("cpu")).at(0)
    measured = check_attention_stability(GPT(recipe), inputs[0, :2], design, **plan)
    return {
        "sigma ratio, configuration": alone["sigma_ratio"],
        "sigma ratio, one forward": measured["sigma_ratio"],
        "sigma ratio x rate": measured["sigma_ratio"] * recipe.rate,
        "rate": recipe.rate,
        "harm probability": alone["harm_probability"],
    }


def table(recipes: Sequence[Recipe], harms: Sequence[float]) -> list[str]:
    """AUROC for harm of what is known before the first step, and how well the probability of harm is calibrated."""
    found = [numbers(recipe) for recipe in recipes]
    harmed = np.asarray(harms) >= HARMED
    lines = [f"check, {name}: AUROC {auroc([x[name] for x in found], harmed):.3f}" for name in found[0]]
    probability = np.array([each["harm probability"] for each in found])
    edges = (0.0, CLEAN_ODDS, 0.2, 0.5, 0.8, 1.0)
    for low, high in zip(edges, edges[1:]):
        own = (probability > low) & (probability <= high)
        lines.append(
            f"check, harm probability {low:g} to {high:g}: {share(harmed[own].tolist())} were harmed"
        )
    return lines
