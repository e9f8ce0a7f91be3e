"""Numbers for people."""

from __future__ import annotations


def number(value: float) -> str:
    """About four digits. From a thousand on they are whole and in groups of three, up to a billion: 131,072.

    >>> number(131072), number(2047.6), number(0.0123456), number(6.022e23)
    ('131,072', '2,048', '0.01235', '6.022e+23')
    """
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.4g}"
