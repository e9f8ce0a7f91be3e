"""What `check_attention_stability` returns: a dictionary that can also print and store itself."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .predict import MARGINAL, NOT_KNOWN, STABLE
from .rates import printed


class StabilityReport(dict[str, Any]):
    """The report of `check_attention_stability`: a dict of plain numbers, strings, lists and dicts.

    verdict: "stable", "marginal", "unstable", or "not known": the scores of the model's class cannot be predicted.
        Then the numbers are those of plain attention, and nothing is recommended.
    rate_verdict: the part of it that rests on the learning rate alone; None if that is not given or does not count.
    learning_rate, warmup: as given; a rate of None is not known.
    sigma_ratio: spread of the scores over the critical spread, in the worst layer.
    margin: how many times larger that spread may become.
    expected_logit_max: mean of a row's largest score minus its mean score, worst layer, nats.
    max_abs_logit: largest |score| of any layer, nats.
    log2_curvature_bound: HNF's bound as the proposal writes it, bits.
    curvature_bound: 2 to that, or inf.
    precision_bits_needed: significand bits of q, k and the weights that are proved to keep every output within
        `tolerance` of the spread of its values.
    typical_bits_needed: significand bits that usually suffice for that.
    float16_safe: whether storing in fp16 is safe or usually safe, and no product q.k overflows; None if not known.
    largest_clean_rate: the largest learning rate that is expected to stay clean of attention's harm; None if attention
        sets no limit (QK-norm), or if it is not known.
    harm_probability: how often attention harmed runs at the given learning rate; None if none was given.
    recommendations: sentences.
    neighbours: the nearest designs whose own verdict at that learning rate is stable, then those that help but are not
        enough.
    weight_logit_bound: with a model, the largest |score| that any input can give, proved.
    weight_logit_typical: with a model and no sample, the largest |score| on a few random tokens. It ranks heads as
        real text does.
    layers: one dict per layer; `weight_logit_bounds` and `weight_logit_typicals` hold one number per head.
    dtypes: number format -> its verdict (`formats.format_verdicts`).
    margins: knob -> how far it may go alone.
    issues: what the diagnosis of the sample found.
    design: the numbers of the design.
    sources: where each number comes from: "measured", "predicted: ...", "assumed: ...", "proved: ...".
    notes: what could not be read or measured, and why.
    """

    def __repr__(self) -> str:
        shown = [self.get("verdict", "no verdict")]
        shown += [f"{key} {self[key]:.3g}" for key in ("sigma_ratio", "margin") if key in self]
        counts = [(len(self.get(key, ())), key) for key in ("layers", "issues", "recommendations", "notes")]
        shown += [f"{count} {key if count > 1 else key[:-1]}" for count, key in counts if count]
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def healthy(self) -> bool:
        """Whether the verdict is stable or marginal. A verdict that is not known is not healthy."""
        return bool(self["verdict"] in (STABLE, MARGINAL))

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON types: infinities and NaN are None."""
        return {key: _plain(value) for key, value in self.items()}

    def about_rate(self) -> str:
        """One line about the learning rate; "" if none was given and no limit is known."""
        rate, largest, harm = self["learning_rate"], self["largest_clean_rate"], self["harm_probability"]
        known = self["verdict"] != NOT_KNOWN
        if rate is None:
            if not known:
                return ""
            if largest is None:
                return "attention sets no limit to the learning rate (QK-norm)"
            after = f"after {self['warmup']} steps of warmup"
            return f"largest learning rate expected to stay clean: {printed(largest)}, {after}"
        limit = (
            f"expected to stay clean up to {printed(largest)}"
            if largest
            else "attention sets no limit (QK-norm)"
        )
        found = "harm not known" if harm is None else f"harm {harm:.0%}, {limit}"
        return f"at a learning rate of {rate:g} with {self['warmup']} steps of warmup: {found}"

    def reason(self) -> str:
        """What the verdict rests on: the learning rate, where it alone gives that verdict, and the spread of scores."""
        spread = f"sigma / sigma_c {self['sigma_ratio']:.2f}, margin {self['margin']:.2f}"
        if self["verdict"] == STABLE or self["rate_verdict"] != self["verdict"]:
            return spread
        harm = f"harm {self['harm_probability']:.0%} at a learning rate of {self['learning_rate']:g}"
        return f"{harm}, expected to stay clean up to {printed(self['largest_clean_rate'])}; {spread}"

    def overflows_elsewhere(self) -> list[str]:
        """One line for each kind of attention with overflows that no other has; no status counts them."""
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
            f"{self['verdict']}: {self.reason()} ({self['sources']['sigma_ratio']})",
            f"largest score of a row {self['expected_logit_max']:.3g} nats ({self['sources']['expected_logit_max']}), "
            f"log2 curvature bound {self['log2_curvature_bound']:.3g}",
            f"bits for q, k and weights: {self['precision_bits_needed']:.0f} proved to suffice, "
            f"{self['typical_bits_needed']:.0f} usually enough, for an error of {self['tolerance']:g} of the values' "
            "spread",
        ]
        for name, found in self["dtypes"].items():
            overflows = f"; overflows: {', '.join(found['overflows'])}" if found["overflows"] else ""
            lines.append(f"{name}: {found['status']}{overflows}")
        if self.about_rate():
            lines.append(self.about_rate())
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
