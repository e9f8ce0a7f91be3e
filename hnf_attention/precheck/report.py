"""What `check_attention_stability` returns: a dictionary that can also print and store itself."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

VERDICTS = ("stable", "marginal", "unstable")


class StabilityReport(dict):
    """The report of `check_attention_stability`: a dict of plain numbers, strings, lists and dicts.

    expected_logit_max: mean of a row's largest score over its mean, worst layer, nats.
    log2_curvature_bound: HNF's bound as the proposal writes it, bits; curvature_bound: 2 to that, or inf.
    precision_bits_needed: significand bits in which q, k and the weights can be stored with every output
        within `tolerance` of the spread of its values, proved; typical_bits_needed: that usually suffice.
    float16_safe: whether storing in fp16 is safe or usually safe, and no product q.k overflows.
    verdict: "stable", "marginal" or "unstable"; sigma_ratio and margin: of the worst layer.
    recommendations: sentences; neighbours: the nearest designs whose own verdict is stable, with their margins,
        then what helps without being enough, with the verdict that is left.
    weight_logit_bound: with a model, the largest |score| of any input, proved; weight_logit_typical: of a short
        sequence of random tokens, which ranks heads as text does. Of each head in `layers`, with an s.
    layers: one dict a layer. dtypes: number format -> verdict, with the overflows that make it unsafe and, apart,
        those that only some code has. margins: knob -> how far it may go.
    design: the numbers all this is for. sources: where each number comes from, "measured", "predicted" or
        "assumed". notes: what could not be read or measured, and why.
    """

    @property
    def healthy(self) -> bool:
        return self["verdict"] != "unstable"

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON types: infinities and NaN are None."""
        return _plain(dict(self))

    def overflows_elsewhere(self) -> list[str]:
        """The overflows that the formats' statuses do not count, by the kind of attention that alone has them."""
        formats: dict[str, list[str]] = {}
        for name, found in self["dtypes"].items():
            for where in dict.fromkeys(found["elsewhere"].values()):
                formats.setdefault(where, []).append(name)
        return [
            f"not counted: {', '.join(names)} overflow{'s' * (len(names) == 1)}, but only in {where}"
            for where, names in formats.items()
        ]

    def summary(self) -> str:
        """The report in a few lines of text."""
        lines = [
            f"{self['verdict']}: sigma / sigma_c {self['sigma_ratio']:.2f}, margin {self['margin']:.2f} "
            f"({self['sources']['sigma_ratio']})",
            f"largest score of a row {self['expected_logit_max']:.3g} nats ({self['sources']['expected_logit_max']}), "
            f"log2 curvature bound {self['log2_curvature_bound']:.3g}",
            f"bits for q, k and weights: {self['precision_bits_needed']:.0f} proved, "
            f"{self['typical_bits_needed']:.0f} usual, for errors of {self['tolerance']:g} of the values' spread",
        ]
        for name, found in self["dtypes"].items():
            overflows = f"; overflows: {', '.join(found['overflows'])}" if found["overflows"] else ""
            lines.append(f"{name}: {found['status']}{overflows}")
        lines += self.overflows_elsewhere()
        lines += [f"-> {text}" for text in self["recommendations"]]
        return "\n".join(lines + [f"note: {text}" for text in self["notes"]])


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
