"""Which training steps are measured, and at which a snapshot is read."""

from __future__ import annotations


class Cadence:
    """Counts steps from 1: what runs before the s-th `end_step()` belongs to step s.

    log_every: every that many steps is a log step, which is measured and read.
    record_every: which other steps are measured: None for none, 1 for all, k for every k-th.
    step: how many steps were done before, for a run that resumes.
    soon: whether the next step is a log step, too.
    resting: while it is True, no step is measured; counting goes on.

    Raises ValueError unless log_every is an int >= 1, record_every None or an int >= 1, step an int >= 0.
    """

    def __init__(self, log_every: int, record_every: int | None = None, step: int = 0):
        _check_count("log_every", log_every, 1, "an int >= 1")
        if record_every is not None:
            _check_count("record_every", record_every, 1, "None or an int >= 1")
        _check_count("step", step, 0, "an int >= 0")
        self.log_every = log_every
        self.record_every = record_every
        self.step = step
        self.soon = False
        self.resting = False
        self._stopped = False

    @property
    def running(self) -> bool:
        """Whether steps are measured at all now."""
        return not (self._stopped or self.resting)

    @property
    def measures_next(self) -> bool:
        """Whether the step to come is measured."""
        if not self.running:
            return False
        step, others = self.step + 1, self.record_every
        return self.soon or step % self.log_every == 0 or (others is not None and step % others == 0)

    @property
    def next_log_step(self) -> int:
        """The number of the log step to come."""
        return self.step + 1 if self.soon else (self.step // self.log_every + 1) * self.log_every

    def end_step(self) -> bool:
        """Count a step. Returns whether it was a log step."""
        self.step += 1
        soon, self.soon = self.soon, False
        return soon or self.step % self.log_every == 0

    def at(self, step: int) -> Cadence:
        """The same cadence with that many steps done before. Raises ValueError as the class does."""
        other = Cadence(self.log_every, self.record_every, step)
        other.resting, other._stopped = self.resting, self._stopped
        return other

    def stop(self) -> None:
        """Measure no further step; counting goes on."""
        self._stopped = True


def _check_count(name: str, value: object, least: int, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"expected {name} to be {expected}, got {value!r}")
