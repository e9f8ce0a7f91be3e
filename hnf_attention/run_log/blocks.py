"""Tables of numbers as short blocks of bytes."""

from __future__ import annotations

import zlib

import numpy as np

from ..errors import InputError

#: Bits of a number's significand that are kept, of fp32's 24: a relative error of at most 2^-12; a chart needs less.
KEPT_BITS = 12
#: Numbers of one block. A file that claims more is refused before memory is taken for them.
MOST_NUMBERS = 1 << 26


#: Characters of an error's message: a damaged file may have anything in the place of a number.
_LONGEST_MESSAGE = 500


class BadLog(InputError):
    """A file that is no run log, that is damaged, or that this version cannot read."""

    def __init__(self, message: str) -> None:
        if len(message) > _LONGEST_MESSAGE:
            half = _LONGEST_MESSAGE // 2
            message = f"{message[:half]} ... {message[-half:]}"
        super().__init__(" ".join(message.split()))


def encode(table: np.ndarray) -> bytes:
    """float32 (rows, columns) as bytes. NaN and infinities stay; other numbers are rounded to `KEPT_BITS`."""
    dropped = 24 - KEPT_BITS
    bits = np.ascontiguousarray(table, dtype="<f4").view("<u4")
    half = np.uint32((1 << (dropped - 1)) - 1)
    rounded = (bits + half + ((bits >> dropped) & 1)) & np.uint32(0xFFFFFFFF << dropped & 0xFFFFFFFF)
    # A NaN whose last bits alone are set would become infinite, the largest finite numbers likewise.
    exponent = np.uint32(0x7F800000)
    kept = np.where((rounded & exponent) == exponent, bits, rounded)
    planes = kept.astype("<u4").view(np.uint8).reshape(-1, 4).T  # bytes of one kind together compress better
    return zlib.compress(np.ascontiguousarray(planes).tobytes(), 1)


def decode(block: bytes, rows: int, columns: int) -> np.ndarray:
    """float32 (rows, columns). Raises BadLog if the block holds something else."""
    count = rows * columns
    if not 0 <= count <= MOST_NUMBERS:
        raise BadLog(f"expected at most {MOST_NUMBERS} numbers, got {rows} x {columns}")
    size = 4 * count
    machine = zlib.decompressobj()
    try:
        data = machine.decompress(block, size + 1)  # no more than that, whatever the block claims
    except zlib.error as error:
        raise BadLog(f"expected compressed numbers: {error}") from None
    if len(data) != size:
        raise BadLog(f"expected {size} bytes, got {'more' if len(data) > size else len(data)}")
    planes = np.frombuffer(data, np.uint8).reshape(4, count)
    return np.ascontiguousarray(planes.T).view("<f4").reshape(rows, columns).astype(np.float32, copy=False)
