"""The thresholds that `--threshold NAME=VALUE` sets."""

from __future__ import annotations

from collections.abc import Sequence

from ..diagnosis.thresholds import checked_thresholds
from ..errors import InputError


def read_thresholds(settings: Sequence[str]) -> dict[str, float]:
    """Name -> value of each "NAME=VALUE".

    Raises InputError for another form, a name that comes twice or is not in the table of thresholds, and a value
    that is not a finite number.
    """
    found: dict[str, float] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"expected --threshold NAME=VALUE, got {setting}")
        if name in found:
            raise InputError(f"expected each threshold once, got --threshold {name} twice")
        try:
            found[name] = float(text)
        except ValueError as error:
            raise InputError(f"expected a number in --threshold {setting}, got {text!r}") from error
    return checked_thresholds(found)
