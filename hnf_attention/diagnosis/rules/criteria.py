"""How bad a sharp head is: sharpness alone is a trained pattern, sharpness with growth is an instability."""

from __future__ import annotations

import numpy as np

from ..heads import Heads
from ..issue import SEVERITIES


def severities(heads: Heads, suspects: np.ndarray, worst: np.ndarray) -> np.ndarray:
    """Severity of each suspect, (H,) of SEVERITIES. suspects, worst: boolean (H,), `worst` within `suspects`.

    An error: one of the worst, and the scores have grown, or rise in most of the layer's heads at once. A warning:
    scores that have grown, or most of the layer. A note: a single sharp head among others, as previous-token and
    induction heads are.
    """
    error, warning, note = SEVERITIES
    rising_together = heads.rising & heads.most_of_layer(worst & heads.rising)
    real = worst & (heads.grown | rising_together)
    alarming = heads.grown | heads.most_of_layer(suspects)
    return np.select([real, alarming], [error, warning], note)
