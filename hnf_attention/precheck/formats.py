"""What each number format makes of a design's scores: bits, overflows, and the status."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from .. import theory
from .design import Design
from .predict import Scores

SAFE, USUALLY_SAFE, UNSAFE = "safe", "usually safe", "unsafe"


def format_verdicts(design: Design, worst: Scores, tolerance: float) -> dict[str, dict[str, Any]]:
    """Format name -> its verdict, if q, k, v and the weights are stored in it.

    status: "safe", "usually safe" or "unsafe". bits: significand bits of the format.
    sound_bits: bits of q, k and the weights that are proved to suffice; typical_bits: bits that usually suffice
        (`theory.required_bits`, for an error of `tolerance` of the values' spread).
    overflows: steps that overflow and make the format unsafe.
    elsewhere: step -> the only kind of attention in which it overflows; the status does not count these.
    error_bound: proved limit of flash attention's error over the values' spread, for values from -1 to 1. Weights
        are stored unscaled; fp8 kernels scale them and have a smaller error.
    """
    sound, typical = _bits_needed(worst, tolerance)
    verdicts = {}
    for name, form in theory.FORMATS.items():
        bound = theory.forward_error_bound_from_norms(
            worst.magnitude, 1.0, 2.0, design.head_dim, worst.keys, theory.flash(form)
        )
        paths = theory.overflow_paths(name, worst.max_abs_logit, design.scale, worst.keys)
        # Library kernels keep products and sums in fp32 and subtract the maximum. Of these steps, the eager
        # attention of the common libraries does one in `name`: it stores products before scaling.
        counted = [p.name for p in paths if p.overflows and p.name.startswith("q.k") and form.bits > 4]
        status = UNSAFE if counted else _status(form.bits, sound, typical)
        verdicts[name] = {
            "status": status,
            "bits": form.bits,
            "sound_bits": sound,
            "typical_bits": typical,
            "error_bound": float(bound) / 2.0,
            "overflows": counted,
            "elsewhere": {p.name: p.where for p in paths if p.overflows and p.name not in counted},
        }
    return verdicts


def _status(bits: int, sound: float, typical: float) -> str:
    if bits >= sound:
        return SAFE
    return USUALLY_SAFE if bits >= typical else UNSAFE


def _bits_needed(worst: Scores, tolerance: float) -> tuple[float, float]:
    """Bits that are proved to suffice for q and k and for the weights, and bits that usually suffice."""
    scores, value = _gaussian_row(worst.row_std, worst.keys)
    sound, typical = 1.0, 1.0
    for stored, limit, usual in (
        ("query_key", worst.magnitude, math.sqrt(2.0) * worst.row_std),
        ("weights", 1.0, 1.0),
    ):
        sound = max(sound, float(theory.required_bits(stored, limit, tolerance)))
        bits = theory.required_bits_of_row(stored, scores, usual, value, tolerance, typical=True)
        typical = max(typical, float(bits))
    return sound, typical


def _gaussian_row(std: float, keys: int) -> tuple[np.ndarray, np.ndarray]:
    """A row whose scores are the quantiles of a Gaussian, (n,), n at most 4096, and independent values (n, 8)."""
    n = min(keys, 4096)
    levels = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    values = torch.randn(n, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (std * torch.special.ndtri(levels)).numpy(), values.numpy()
