"""Work for a thread of its own: training never waits for a service, and no service ends it."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable

from ..errors import InputError

_log = logging.getLogger("hnf_attention")

#: Jobs that wait for a service that is slow or away. Past that the oldest are given up.
MOST_WAITING = 64
#: Seconds that `Background.close` and the end of the process wait for the thread.
PATIENCE = 30.0
_LONGEST_PAUSE = 60.0  # seconds between two attempts

Job = Callable[[], object]


class Background:
    """Runs jobs one after the other on a thread, which the first job starts.

    name: who hands the jobs over, for log lines. noun: what a job is, in the plural.
    attempts: how often a job that raises is tried, after pauses of 1, 2, 4, ... seconds, 60 at most; then it is
        dropped.
    The first failure is logged, and so is the recovery with the number of jobs that were dropped.
    """

    def __init__(self, name: str, noun: str, attempts: int) -> None:
        self._about = (name, noun, attempts)
        self._worker: _Worker | None = None
        self._refused = False  # the process has no more threads, and that was logged

    def put(self, job: Job) -> None:
        """Hand a job over. A forked process, which has no such thread, drops it."""
        if self._worker is None or self._worker.ended:
            worker = _Worker(*self._about)
            try:
                worker.start()
            except RuntimeError as error:  # too many threads, or the end of the process
                self._refuse(error)
                return
            self._worker, self._refused = worker, False
            weakref.finalize(self, _Worker.finish, worker, PATIENCE)  # at the end of the process, too
        self._worker.put(job)

    def flush(self, timeout: float = PATIENCE) -> bool:
        """Wait until every job is done or dropped. Returns whether that is so, and none of them waits.

        A forked process waits for nothing: its jobs are the other process's.
        """
        return self._worker is None or self._worker.wait(timeout)

    def close(self, timeout: float = PATIENCE) -> None:
        """Give each waiting job a last attempt, and end the thread. A later job starts another one."""
        if self._worker is not None:
            self._worker.finish(timeout)

    def _refuse(self, error: RuntimeError) -> None:
        if not self._refused:
            name, noun, _ = self._about
            _log.warning("%s gets no thread (%s); %s are dropped until it does", name, error, noun)
        self._refused = True


class _Worker(threading.Thread):
    """jobs: what waits, oldest first; the job under way is the first."""

    def __init__(self, name: str, noun: str, attempts: int) -> None:
        super().__init__(name=f"hnf-attention {name}", daemon=True)
        self.ended = False
        self._who, self._noun, self._attempts = name, noun, attempts
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._failing = False
        self._dropped = 0
        self._process = os.getpid()

    @property
    def _forked(self) -> bool:
        """Whether this is another process, where the lock may be held for ever by a thread that is not there."""
        return os.getpid() != self._process

    def put(self, job: Job) -> None:
        if self._forked:
            return
        with self._changed:
            self._jobs.append(job)
            if len(self._jobs) > MOST_WAITING:
                self._jobs.popleft()
                self._dropped += 1
            self._changed.notify_all()

    def wait(self, timeout: float) -> bool:
        if self._forked:
            return True
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs, timeout)

    def finish(self, timeout: float) -> None:
        self.ended = True
        if self._forked:
            return
        with self._changed:
            self._changed.notify_all()
        if threading.current_thread() is self:  # its last job held the last reference to the `Background`
            return
        self.join(timeout)
        if self.is_alive():
            _log.warning(
                "%s is left after %g s; %s that wait: %d", self._who, timeout, self._noun, len(self._jobs)
            )

    def run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self.ended)
                if not self._jobs:
                    break
                job = self._jobs[0]
            self._do(job)
            with self._changed:
                if self._jobs and self._jobs[0] is job:
                    self._jobs.popleft()
                self._changed.notify_all()
            del job  # it may hold the last reference to the `Background`, which ends this thread
        if self._failing:
            _log.warning("%s ends; %s dropped: %d", self._who, self._noun, self._dropped)

    def _do(self, job: Job) -> None:
        for attempt in range(1, self._attempts + 1):
            try:
                job()
            except BaseException as error:  # SystemExit, too: it would end this thread alone, without a word
                self._tell(error)
                if attempt < self._attempts and self._rest(job, min(2.0 ** (attempt - 1), _LONGEST_PAUSE)):
                    continue
                with self._changed:
                    self._dropped += self._jobs[0] is job  # else it was counted when it was given up
                return
            if self._failing:
                _log.warning("%s works again; %s dropped: %d", self._who, self._noun, self._dropped)
                self._failing, self._dropped = False, 0
            return

    def _rest(self, job: Job, seconds: float) -> bool:
        """Pause. Returns whether the job is to be tried again: not if it was given up, or at the end."""
        until = time.monotonic() + seconds
        with self._changed:
            self._changed.wait_for(lambda: self.ended or self._jobs[0] is not job, until - time.monotonic())
            return not self.ended and self._jobs[0] is job

    def _tell(self, error: BaseException) -> None:
        if not self._failing:
            self._failing = True
            explained = isinstance(error, InputError)  # its message is all that there is to say
            _log.warning(
                "%s failed%s; training goes on, and %s are tried again or dropped",
                self._who,
                f": {error}" if explained else f" ({type(error).__name__}: {error})",
                self._noun,
                exc_info=None if explained else error,
            )
