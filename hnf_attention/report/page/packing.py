"""Numbers of a run as bytes for the page: one byte each on a scale, as differences in time, compressed."""

from __future__ import annotations

import base64
import math
import zlib
from dataclasses import dataclass

import numpy as np

LAST = 252  #: the largest code of a finite number
MINUS_INFINITE, INFINITE, NO_NUMBER = 253, 254, 255  #: codes of what no scale holds
#: A scale is logarithmic if its positive numbers span more than this ratio.
_LOG_RATIO = 50.0
#: A logarithmic scale reaches this far below its largest number.
_LOG_REACH = 1e8


@dataclass(frozen=True)
class Scale:
    """How codes from 0 to LAST become numbers.

    log: code c is low * (high / low) ** (c / LAST), and code 0 is everything up to `low`; else the steps are equal.
    """

    low: float
    high: float
    log: bool

    @staticmethod
    def of(values: np.ndarray) -> Scale:
        """For these numbers, of any shape; those that are not finite do not count."""
        found = values[np.isfinite(values)]
        if not found.size:
            return Scale(0.0, 1.0, False)
        low, high = float(found.min()), float(found.max())
        positive = found[found > 0]
        if low >= 0 and positive.size:
            smallest = max(float(positive.min()), high / _LOG_REACH)
            if high / smallest > _LOG_RATIO and high > 1:  # shares between 0 and 1 stay as they are
                return Scale(smallest, high, True)
        if high == low:
            return Scale(low, low + max(abs(low), 1.0), False)
        return Scale(low, high, False)

    def codes(self, values: np.ndarray) -> np.ndarray:
        """uint8 of the same shape."""
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            if self.log:
                part = np.log(np.maximum(values, self.low) / self.low) / math.log(self.high / self.low)
            else:
                part = (values - self.low) / (self.high - self.low)
            found = np.rint(np.clip(np.nan_to_num(part), 0.0, 1.0) * LAST).astype(np.uint8)
        found[np.isnan(values)] = NO_NUMBER
        found[np.isposinf(values)] = INFINITE
        found[np.isneginf(values)] = MINUS_INFINITE
        return found


def steady(codes: np.ndarray) -> np.ndarray:
    """Codes (steps, heads) where a number that moves by a single code keeps the code before it.

    Noise then costs few bytes. The error of a code is at most 1.5 codes in place of half a code.
    """
    kept = codes.copy()
    for before, now in zip(kept, kept[1:]):
        near = (np.abs(now.astype(np.int16) - before) <= 1) & (now <= LAST) & (before <= LAST)
        now[near] = before[near]
    return kept


def pack(codes: np.ndarray) -> str:
    """uint8 (steps, heads) as base64 text: heads one after the other, differences in time modulo 256, zlib."""
    moved = codes.copy()
    moved[1:] -= codes[:-1]
    return base64.b64encode(zlib.compress(np.ascontiguousarray(moved.T).tobytes(), 6)).decode("ascii")
