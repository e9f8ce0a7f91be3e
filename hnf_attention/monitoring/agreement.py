"""Processes agree to meet before they exchange statistics, so that none waits for one that does not come.

A collective operation of torch.distributed waits for every process of its group, up to the group's own time limit of
many minutes, and ends the run after that. Here each process first registers in the key-value store by which the
processes found each other. A process that has waited too long writes its verdict there. The first verdict counts, so
that all processes meet or none does.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch.distributed as dist

from ..compat import default_store
from ..errors import let_out
from .process_groups import ProcessGroups, Reading, SharedFault

_log = logging.getLogger("hnf_attention")
_MEET = "meet"
_POLL_SECONDS = 0.0005, 0.25  # at first, and at most: a wait doubles it

_made: Counter[str] = Counter()  # how many agreements of the same members this process has made


class Agreement:
    """Meetings of the same processes, one after the other.

    members: their ranks in the world. time_limit: seconds that a process waits for the others.
    Every process has to make its agreements with the same members in the same order.
    """

    def __init__(self, members: Sequence[int], time_limit: float):
        who = hashlib.sha256(repr(sorted(members)).encode()).hexdigest()[:16]
        self._key = f"hnf_attention/{who}/{_made[who]}"
        _made[who] += 1
        self._members = len(members)
        self._time_limit = time_limit
        self._met = 0  # meetings so far

    def meet(self) -> str | None:
        """Wait for all members. Returns None if all came, else why they do not meet: the same in all of them."""
        store, key = default_store(), f"{self._key}/{self._met}"
        self._met += 1
        if store.check([f"{key}/verdict"]):
            return _reason(store.get(f"{key}/verdict"))
        if store.add(f"{key}/count", 1) == self._members:
            verdict = store.compare_set(f"{key}/verdict", "", _MEET)
            if self._met > 1:  # everybody is here, so everybody has read the last verdict
                for name in ("count", "verdict"):
                    store.delete_key(f"{self._key}/{self._met - 2}/{name}")
            return _reason(verdict)
        end, pause = time.monotonic() + self._time_limit, _POLL_SECONDS[0]
        while not store.check([f"{key}/verdict"]):
            if time.monotonic() > end:
                came = store.add(f"{key}/count", 0)
                why = f"{came} of {self._members} processes came within {self._time_limit:g} s"
                return _reason(store.compare_set(f"{key}/verdict", "", why))
            time.sleep(pause)
            pause = min(2.0 * pause, _POLL_SECONDS[1])
        return _reason(store.get(f"{key}/verdict"))

    def leave(self, why: str) -> None:
        """Tell the others that this process comes to no further meeting: none of them waits for it."""
        default_store().compare_set(f"{self._key}/{self._met}/verdict", "", why)


def _reason(verdict: bytes) -> str | None:
    text = verdict.decode()
    return None if text == _MEET else text


class Together:
    """Statistics of several processes together, as long as all of them come to each log step.

    compare: gives why this process and the others do not run the same model, None if they do. It may communicate. It
        is called once, when the processes meet for the first time.
    lost: why each process goes on with its own measurements, for good; None while they are put together.
    """

    def __init__(self, groups: ProcessGroups, compare: Callable[[], str | None] = lambda: None):
        self.groups = groups
        self.lost: str | None = None
        self._compare: Callable[[], str | None] | None = compare
        members = groups.members
        self._agreement = None if members is None else Agreement(members, groups.time_limit)
        if members is None and groups.leads:
            _log.warning(
                "the attention monitor has no time limit for processes that do not come to a log step: its %d groups "
                "leave out some of the run's %d processes, so that it does not know which processes it waits for. A "
                "process that waits does so up to the time limit of torch.distributed, which ends the run",
                len(groups.groups),
                dist.get_world_size(),
            )

    def combine(self, read: Callable[[], Reading]) -> Reading:
        """What `read` gives in all processes; in this one alone if they do not meet, or have not met before.

        Raises SharedFault as `ProcessGroups.combine` does.
        """
        if self.lost is not None:
            return read()
        taken: list[Reading] = []

        def read_once() -> Reading:
            taken.append(read())
            return taken[0]

        try:
            why = None if self._agreement is None else self._agreement.meet()
            if why is None and self._compare is not None:
                compare, self._compare = self._compare, None
                why = compare()
            if why is None:
                return self.groups.combine(read_once)
        except SharedFault:
            raise
        except Exception as error:  # of the store or of a collective operation, of whatever kind
            why = f"{type(error).__name__}: {error}"
            self.leave(f"process {dist.get_rank()} failed: {why}" if dist.is_initialized() else why)
            let_out(error)
        self.lost = why
        _log.warning(
            "the attention monitor goes on with the measurements of each process alone: %s. Process 0 writes "
            "and logs its own part of the batch",
            why,
        )
        return taken[0] if taken else read()

    def leave(self, why: str) -> None:
        """Tell the others that this process does not come again. Nothing is raised."""
        if self._agreement is None or self.lost is not None:
            return
        self.lost = why
        try:
            self._agreement.leave(why)
        except Exception as error:  # the store is gone, with the process that held it
            let_out(error)
            _log.debug("could not tell the other processes: %s", why, exc_info=True)
