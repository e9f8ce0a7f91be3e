"""Numbers rounded as they are printed, to the safe side."""

from __future__ import annotations

import decimal


def rounded_up(x: float) -> float:
    """x to three significant digits, never below x. A number that prints with three digits stays: 1.1 is 1.1."""
    return _rounded(x, decimal.ROUND_UP)


def rounded_down(x: float) -> float:
    """x to three significant digits, never above x."""
    return _rounded(x, decimal.ROUND_DOWN)


def _rounded(x: float, rounding: str) -> float:
    return float(decimal.Context(prec=3, rounding=rounding).create_decimal(repr(float(x))))
