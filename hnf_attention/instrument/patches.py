"""Replacing a function in place, and putting it back: exact, shared, and never over somebody else."""

from __future__ import annotations

import threading
from collections.abc import Callable

_lock = threading.RLock()  # re-entrant: a garbage collection inside it may release a patch
_MARK = "_hnf_attention_patch"


class Patch:
    """A function replaced while at least one user holds it.

    A second user of the same place shares the first one's replacement. The last `release` puts the
    original back, unless somebody else has replaced ours meanwhile: theirs stays, and ours, which
    they may still call, hands every call on to the original.
    """

    def __init__(self, read: Callable[[], Callable], write: Callable[[Callable], None]):
        self._read, self._write = read, write
        self._users = 0

    @staticmethod
    def acquire(
        read: Callable[[], Callable],
        write: Callable[[Callable], None],
        replacement: Callable[[Callable], Callable],
    ) -> Patch:
        """Replace what `read` returns by `replacement(original)`, or share the patch already there."""
        with _lock:
            current = read()
            patch = getattr(current, _MARK, None)
            # The mark alone proves nothing: functools.wraps copies it to a wrapper around ours.
            if patch is None or patch._ours is not current:
                patch = Patch(read, write)
                patch._original, patch._ours = current, replacement(current)
                setattr(patch._ours, _MARK, patch)
                write(patch._ours)
            patch._users += 1
            return patch

    def release(self) -> None:
        """Give up one use; the last one restores the original."""
        with _lock:
            self._users -= 1
            if self._users == 0 and self._read() is self._ours:
                self._write(self._original)
