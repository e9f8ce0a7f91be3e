"""Which step each forward was part of, in bounded memory."""

from __future__ import annotations

from array import array
from bisect import bisect_right

#: So many steps are told apart. Where there are more, 2, 4, 8, ... of them count as the first one.
MOST_STEPS = 1 << 17
#: Forwards that may still run: one on each thread, and the second forwards of their checkpoints.
_RUNNING = 256


class ForwardSteps:
    """Numbers forwards from 1, in their order, and knows the step of each number.

    The numbers go on when it is restarted.
    """

    def __init__(self) -> None:
        self._count = 0
        self._known: dict[int, int] = {}  # numbers of the latest forwards, by `Forward.number`
        self._firsts, self._steps = array("q"), array("q")  # the first number of each step
        self._grain = 1  # steps that count as one

    def number(self, forward: int, step: int) -> int:
        """The number of a forward, which is part of that step. forward: its `Forward.number`."""
        known = self._known.get(forward)
        if known is None:
            known = self._known[forward] = self.next_number(step)
            self._count = known
            if len(self._known) > _RUNNING:
                del self._known[next(iter(self._known))]
        return known

    def next_number(self, step: int) -> int:
        """The number of the next forward, as part of that step."""
        number = self._count + 1
        if self._firsts and self._firsts[-1] == number:
            self._steps[-1] = step
        elif not self._steps or abs(step - self._steps[-1]) >= self._grain:
            self._firsts.append(number)
            self._steps.append(step)
            if len(self._steps) > MOST_STEPS:
                del self._firsts[1::2], self._steps[1::2]
                self._grain *= 2
        return number

    def skip(self, number: int) -> None:
        """Count a forward that nobody tells of, unless its number was given to another one."""
        self._count = max(self._count, number)

    def step_of(self, number: int) -> int:
        """The step of a forward, 0 if it ran before the last restart."""
        place = bisect_right(self._firsts, number) - 1
        return self._steps[place] if place >= 0 and 0 < number <= self._count + 1 else 0

    def restart(self) -> None:
        """Forget all steps, but that of a number which `next_number` gave for a forward to come."""
        self._known.clear()
        self._grain = 1
        keep = bool(self._firsts) and self._firsts[-1] > self._count
        end = len(self._firsts) - keep
        del self._firsts[:end], self._steps[:end]
