"""What each number format makes of a design's scores: bits, overflows, and the status."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .. import theory
from .design import Design
from .predict import NOT_KNOWN, Scores

SAFE, USUALLY_SAFE, UNSAFE = "safe", "usually safe", "unsafe"
_SHARPEST = 100.0  # nats: a wider spread takes the same bits, and its small weights have no number in fp64
_ROWS, _KEYS = 20, 1024  # random rows, all of which the usual bits suffice for, and the most keys of one


def format_verdicts(
    design: Design, worst: Scores, tolerance: float, *, known: bool = True
) -> dict[str, dict[str, Any]]:
    """Format name -> its verdict, if q, k, v and the weights are stored in it.

    known: whether the scores are; if not, every status is "not known".
    status: "safe" if storing is proved to keep the tolerance, and the error bound of computing is within it. "usually
        safe" if storing usually keeps the tolerance, and the format adds at most the tolerance to the error bound of
        fp32. "unsafe" otherwise.
    bits: significand bits of the format. sound_bits: bits of q, k and the weights that are proved to suffice;
        typical_bits: bits that sufficed for each of 20 random rows (`theory.required_bits`, for an error of
        `tolerance` of the values' spread).
    overflows: steps that overflow and make the format unsafe.
    elsewhere: step -> the only kind of attention in which it overflows; the status does not count these.
    error_bound: proved limit of flash attention's error over the values' spread, for values from -1 to 1, given the
        stored q, k and v. Weights are stored unscaled, and sums are fp32. Kernels of 8-bit numbers scale the weights,
        and their sums may hold less: see `theory.eight_bit_flash`.
    """
    sound, typical = _bits_needed(worst, tolerance)
    bounds = {
        name: 0.5
        * float(
            theory.forward_error_bound_from_norms(
                worst.magnitude, 1.0, 2.0, design.head_dim, worst.keys, theory.flash(form)
            )
        )
        for name, form in theory.FORMATS.items()
    }
    verdicts = {}
    for name, form in theory.FORMATS.items():
        paths = theory.overflow_paths(name, worst.max_abs_logit, design.scale, worst.keys)
        # Library kernels keep products and sums in fp32 and subtract the maximum. Of these steps, the eager
        # attention of the common libraries does one in `name`: it stores products before scaling.
        counted = [p.name for p in paths if p.overflows and p.name.startswith("q.k") and form.bits > 4]
        status = NOT_KNOWN if not known else UNSAFE
        if known and not counted and bounds[name] - bounds["float32"] <= tolerance and form.bits >= typical:
            status = SAFE if form.bits >= sound and bounds[name] <= tolerance else USUALLY_SAFE
        verdicts[name] = {
            "status": status,
            "bits": form.bits,
            "sound_bits": sound,
            "typical_bits": typical,
            "error_bound": bounds[name],
            "overflows": counted,
            "elsewhere": {p.name: p.where for p in paths if p.overflows and p.name not in counted},
        }
    return verdicts


def _bits_needed(worst: Scores, tolerance: float) -> tuple[float, float]:
    """Bits that are proved to suffice for q and k and for the weights, and bits that usually suffice."""
    std = min(worst.row_std, _SHARPEST)
    scores, value = _gaussian_rows(std, worst.keys)
    sound, typical = 1.0, 1.0
    for stored, limit, usual in (
        ("query_key", worst.magnitude, math.sqrt(2.0) * std),
        ("weights", 1.0, 1.0),
    ):
        sound = max(sound, float(theory.required_bits(stored, limit, tolerance)))
        bits = theory.required_bits_of_row(stored, scores, usual, value, tolerance, typical=True)
        typical = max(typical, float(bits.max()))
    return sound, typical


def _gaussian_rows(std: float, keys: int) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian scores (_ROWS, n), n at most _KEYS, and values independent of them (_ROWS, n, 8)."""
    n = min(keys, _KEYS)
    generator = np.random.default_rng(0)
    return std * generator.standard_normal((_ROWS, n)), generator.standard_normal((_ROWS, n, 8))
