"""Which calls continue a call of the forward before, as in decoding with a cache."""

from __future__ import annotations

from .measurement import Forward

_Keys = tuple[int, int]  # B, N


class Decoding:
    """What the last two forwards of one layer had for keys. Several calls of a forward may differ in that."""

    def __init__(self) -> None:
        self._number = -1
        self._now: set[_Keys] = set()
        self._before: set[_Keys] = set()

    def continues(self, forward: Forward, batch: int, num_queries: int, num_keys: int) -> bool:
        """Whether a call of `forward` adds num_queries keys to those of a call of the forward before."""
        if forward.number != self._number:
            self._number, self._before, self._now = forward.number, self._now, set()
        self._now.add((batch, num_keys))
        return 0 < num_queries < num_keys and (batch, num_keys - num_queries) in self._before
