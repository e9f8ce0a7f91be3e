"""How bad a sharp head is: sharpness alone is a trained pattern, sharpness with growth is an instability."""

from __future__ import annotations

import numpy as np

from ..heads import Heads
from ..issue import SEVERITIES


def severities(heads: Heads, suspects: np.ndarray, worst: np.ndarray) -> np.ndarray:
    """Severity of each suspect, (H,) of SEVERITIES. suspects, worst: boolean (H,), `worst` within `suspects`.

    An error: one of the worst, and its scores are `alarming`. A warning: its scores have grown; in a model that does
    not train, most of the layer is like it. A note: sharp without growth, as previous-token and induction heads are.
    """
    error, warning, note = SEVERITIES
    real = worst & heads.alarming
    suspicious = heads.grown | (heads.most_of_layer(suspects) & heads.finished)
    return np.select([real, suspicious], [error, warning], note)
