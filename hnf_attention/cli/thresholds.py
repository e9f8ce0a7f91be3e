"""The thresholds that `--threshold NAME=VALUE` sets."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..diagnosis.thresholds import THRESHOLDS
from ..errors import InputError
from .messages import nearest


def read_thresholds(settings: Sequence[str]) -> dict[str, float]:
    """Name -> value of each "NAME=VALUE".

    Raises InputError for another form, a name that is not in the table of thresholds or comes twice, and a value
    that is not a finite number.
    """
    found: dict[str, float] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"expected --threshold NAME=VALUE, got {setting}")
        if name not in THRESHOLDS:
            known = nearest(name, list(THRESHOLDS)) or f"; known are {', '.join(sorted(THRESHOLDS))}"
            raise InputError(
                f"expected the name of a threshold in --threshold {setting}, got {name!r}{known}"
            )
        if name in found:
            raise InputError(f"expected each threshold once, got --threshold {name} twice")
        try:
            found[name] = float(text)
        except ValueError:
            found[name] = math.nan
        if not math.isfinite(found[name]):
            raise InputError(f"expected a number in --threshold {setting}, got {text!r}")
    return found
