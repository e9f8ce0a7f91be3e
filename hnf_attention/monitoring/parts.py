"""The parts of a monitor that may fail: each rests after a fault and is tried again, and none ends the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

from ..errors import InputError, let_out
from ..names import display_name

_log = logging.getLogger("hnf_attention")
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

#: A part that keeps failing is tried again after 1, 2, 4, ... log steps, and after so many at most.
LONGEST_REST = 64


@dataclass(frozen=True)
class Outage:
    """A part that does not work now.

    reason: the latest error. since: the step of the first failure, failures: how many there were since then.
    again: the step of the next attempt; None if there is none.
    """

    reason: str
    since: int
    failures: int
    again: int | None

    def __str__(self) -> str:
        times = "" if self.failures < 2 else f" ({self.failures} failures)"
        when = "it is not tried again" if self.again is None else f"tried again at step {self.again}"
        return f"off since step {self.since}{times}: {self.reason}; {when}"


@dataclass(frozen=True)
class MonitorStatus:
    """What of a monitor is off, and why. `bool(status)` is whether everything works.

    failing: layers whose measuring failed at the last attempt, and why. They are tried again after 1, 2, 4, ... calls.
    """

    off: Mapping[str, Outage] = field(default_factory=dict)
    failing: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return not self.off and not self.failing

    def __str__(self) -> str:
        lines = [f"{name}: {outage}" for name, outage in self.off.items()]
        lines += [f"layer {display_name(name)}: {why}; tried again" for name, why in self.failing.items()]
        return "\n".join(lines) or "all parts work"


class Parts:
    """Runs the parts, and remembers which of them rest.

    log_every: steps from one log step to the next. Rests are counted in log steps.
    """

    def __init__(self, log_every: int) -> None:
        self._log_every = log_every
        self._step = 0  # of the log step under way
        self._log_steps = 0
        self._off: dict[str, Outage] = {}
        self._next: dict[str, int] = {}  # the number of the log step of the next attempt

    @property
    def off(self) -> dict[str, Outage]:
        """Which parts are off now."""
        return dict(self._off)

    def begin_log_step(self, step: int) -> None:
        """A log step begins, at this step of the training."""
        self._step = step
        self._log_steps += 1

    def rests(self, part: str, log_steps: int = 0) -> bool:
        """Whether the part is left out that many log steps from now."""
        if part not in self._off:
            return False
        return self._off[part].again is None or self._log_steps + log_steps < self._next[part]

    def end(self, part: str, reason: str) -> None:
        """End a part for good. It is not logged."""
        before = self._off.get(part)
        since, failures = (self._step, 0) if before is None else (before.since, before.failures)
        self._off[part] = Outage(reason, since, failures, None)

    def run(
        self,
        part: str,
        action: Callable[_Arguments, _Result],
        *args: _Arguments.args,
        **kwargs: _Arguments.kwargs,
    ) -> _Result | None:
        """The action's result; None while the part rests, and if the action fails.

        The first failure is logged, and so is the recovery.
        """
        if self.rests(part):
            return None
        try:
            result = action(*args, **kwargs)
        except Exception as error:  # of whatever kind: training goes on without this part
            let_out(error)
            self._fail(part, error)
            return None
        outage = self._off.pop(part, None)
        if outage is not None:
            _log.warning(
                "the attention monitor's part %r works again at step %d, after %d failure%s since step %d",
                part,
                self._step,
                outage.failures,
                "" if outage.failures == 1 else "s",
                outage.since,
            )
        return result

    def _fail(self, part: str, error: Exception) -> None:
        before = self._off.get(part)
        failures = 1 if before is None else before.failures + 1
        rest = min(2 ** (failures - 1), LONGEST_REST)
        self._next[part] = self._log_steps + rest
        again = self._step + rest * self._log_every
        reason = f"{type(error).__name__}: {error}"
        self._off[part] = Outage(reason, self._step if before is None else before.since, failures, again)
        if before is None:
            explained = isinstance(error, InputError)  # its message is all that there is to say
            _log.warning(
                "the attention monitor's part %r failed at step %d%s; it is tried again at step %d, training goes on",
                part,
                self._step,
                f": {error}" if explained else "",
                again,
                exc_info=not explained,
            )
