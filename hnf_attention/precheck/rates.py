"""How likely attention is to harm a training run, and the largest learning rate at which it is unlikely.

Adam moves every weight by up to the rate in a step, whatever the gradient. Queries and keys of a normalised input of
width d thereby grow by up to rate * d a step, and their scores by the square of the sum. Temperature enters by its
square root, as scores are 1 / T times a product of two such sums; a fit gives half of that power.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .design import Design, positive
from .predict import MARGINAL, STABLE, UNSTABLE
from .rounding import rounded_down

#: Log odds of harm, by logistic regression on 239 runs of the laboratory (docs/validation.md), of which 94 were harmed.
#: AUROC 0.94, cross-validated over architectures. Widths 64 to 192, rates 3e-4 to 3e-2, warmups 5 to 200 steps.
INTERCEPT, BY_RATE, BY_WARMUP, BY_ROPE, BY_INIT = 3.22, 3.10, -0.72, 1.27, 1.12
SHARPNESS_POWER = 0.25
USUAL_STD = 0.02  # of the initial weights
#: The verdict counts the rate up to this width, four times the largest measured one; beyond it the report says so.
WIDEST = 768
#: A rate is expected to stay clean if harm is less likely than this: none of 82 such runs was harmed.
CLEAN_ODDS = 0.05
WARMUP = 100  # steps, where none is given
OPTIMIZERS = ("adam", "adamw")
SOURCE = "fitted: own laboratory (docs/validation.md), AdamW, 500 steps"


@dataclass(frozen=True)
class TrainingPlan:
    """learning_rate: the largest of the run; None for not known. warmup: steps up to it."""

    learning_rate: float | None = None
    warmup: int = WARMUP


def checked_plan(learning_rate: Any, warmup: Any, optimizer: Any) -> TrainingPlan:
    """The plan. Raises ValueError unless the rate is finite and above 0, warmup an int >= 0, the optimizer known."""
    if learning_rate is not None:
        learning_rate = positive("learning_rate", learning_rate)
    if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 0:
        raise ValueError(f"expected warmup to be an int >= 0, got {warmup!r}")
    if not isinstance(optimizer, str) or optimizer.lower() not in OPTIMIZERS:
        raise ValueError(
            f"expected optimizer in {OPTIMIZERS}, for which rates were measured, got {optimizer!r}"
        )
    return TrainingPlan(learning_rate, warmup)


def harm_probability(design: Design, rate: float, warmup: int) -> float:
    """How often attention harmed runs like this one: they ended 0.1 nat or more above their twins with QK-norm.

    0 for a design with QK-norm, whose scores are bounded whatever the rate.
    """
    if design.qk_norm:
        return 0.0
    odds = _constant(design, warmup) + BY_RATE * math.log(rate)
    return 1.0 / (1.0 + math.exp(-max(-700.0, min(700.0, odds))))


def largest_clean_rate(design: Design, warmup: int) -> float | None:
    """The rate at which harm has a probability of CLEAN_ODDS; None with QK-norm, where attention sets no limit."""
    if design.qk_norm:
        return None
    odds = math.log(CLEAN_ODDS / (1.0 - CLEAN_ODDS))
    return math.exp((odds - _constant(design, warmup)) / BY_RATE)


def counted_harm(design: Design, plan: TrainingPlan) -> float | None:
    """How often attention harmed runs at the plan's rate, where the verdict on the design counts that.

    None without a rate, and for models wider than WIDEST.
    """
    if plan.learning_rate is None or design.d_model > WIDEST:
        return None
    return harm_probability(design, plan.learning_rate, plan.warmup)


def printed(rate: float) -> str:
    """The largest clean rate as people read it: never above the rate, so that it is clean as printed, too."""
    return f"{rounded_down(rate):.3g}"


def verdict(probability: float | None) -> str:
    """As the verdict on a spread: stable where harm is unlikely, unstable where it is likelier than not.

    Stable for None, where the rate is not counted.
    """
    if probability is None:
        return STABLE
    return STABLE if probability <= CLEAN_ODDS else MARGINAL if probability <= 0.5 else UNSTABLE


def _constant(design: Design, warmup: int) -> float:
    """Log odds of harm at a rate of 1."""
    std = math.sqrt(design.query_std * design.key_std)
    size = math.log(design.d_model) - SHARPNESS_POWER * math.log(design.relative_temperature)
    return (
        INTERCEPT
        + BY_RATE * size
        + BY_WARMUP * math.log(max(1, warmup))
        + BY_ROPE * (design.rotary > 0)
        + BY_INIT * math.log(std / USUAL_STD)
    )
