"""How bad a sharp head is: sharpness alone is a trained pattern, sharpness with growth is an instability."""

from __future__ import annotations

import numpy as np

from ..heads import Heads
from ..issue import SEVERITIES


def severities(heads: Heads, suspects: np.ndarray, worst: np.ndarray) -> np.ndarray:
    """Severity of each suspect, (H,) of SEVERITIES. suspects, worst: boolean (H,), `worst` within `suspects`.

    An error: one of the worst, and its scores are `alarming`. A warning: its scores have grown; or, in a model that
    does not train, most heads of its layer are among the worst. A note: sharp without growth, as previous-token and
    induction heads are. In the laboratory's models at the end of their training (docs/validation.md), warnings came in
    56 of 59 harmed ones and in 6 of 49 clean ones. They came in 33 of these when layers of suspects were warned of.
    """
    error, warning, note = SEVERITIES
    real = worst & heads.alarming
    suspicious = heads.grown | (suspects & heads.most_of_layer(worst) & heads.finished)
    return np.select([real, suspicious], [error, warning], note)
