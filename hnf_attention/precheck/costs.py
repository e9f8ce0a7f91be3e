"""What a change of a design costs: weights, arithmetic and cache of its attention, over those it has now."""

from __future__ import annotations

from dataclasses import dataclass

from .design import Design


@dataclass(frozen=True)
class Cost:
    """Ratios of all attention layers together; 1 is as before.

    weights: numbers in the query, key, value and output projections. flops: of one token that sees all its keys.
    cache: keys and values of a whole sequence. Norms and caps count as nothing: their share is below a percent.
    """

    weights: float
    flops: float
    cache: float

    def __str__(self) -> str:
        """'weights x 4, FLOPs x 3.2, cache x 2', or 'none'."""
        named = (("weights", self.weights), ("FLOPs", self.flops), ("cache", self.cache))
        return (
            ", ".join(f"{name} x {ratio:.3g}" for name, ratio in named if abs(ratio - 1.0) > 5e-3) or "none"
        )


def cost(design: Design, changed: Design) -> Cost:
    """What the changed design costs, over what the design costs."""
    before, after = _numbers(design), _numbers(changed)
    return Cost(*(new / old for new, old in zip(after, before, strict=True)))


def _numbers(design: Design) -> tuple[float, float, float]:
    """Weights, floating-point operations of a token, and cached numbers."""
    layers = range(design.n_layers)
    width, cached = design.n_heads * design.head_dim, 2 * design.n_kv_heads * design.head_dim
    weights = design.n_layers * design.d_model * (2 * width + cached)
    keys = sum(design.keys(layer) for layer in layers)
    # A multiply and an add each, for q.k and for the weights times v.
    return weights, 2.0 * weights + 4.0 * keys * width, float(keys * cached)
