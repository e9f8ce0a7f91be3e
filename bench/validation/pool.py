"""Many tasks in several processes, up to a deadline; whatever ended by then is kept."""

from __future__ import annotations

import multiprocessing
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import Any

from .clock import OutOfTime
from .record import Packed

_GRACE = 20.0  # seconds past the deadline after which a process that hangs is ended
#: (task, device, deadline of `time.monotonic`) -> result; a function of a module, because other processes call it
Work = Callable[[Any, str, float], Any]


@dataclass(frozen=True)
class Done:
    """A task that ended. problem: why it has no result; "" if it has one."""

    task: Any
    seconds: float
    result: Any
    problem: str = ""


def run(work: Work, tasks: Sequence[Any], device: str, processes: int, seconds: float) -> Iterator[Done]:
    """Do the tasks, each in one of the processes, for `seconds` at most; results come as they are ready."""
    deadline = time.monotonic() + seconds
    context = multiprocessing.get_context("spawn")
    queue, results = context.Queue(), context.Queue()
    for task in tasks:
        queue.put(task)
    for _ in range(processes):
        queue.put(None)
    arguments = (work, queue, results, device, deadline)
    workers = [context.Process(target=_serve, args=arguments, daemon=True) for _ in range(processes)]
    for worker in workers:
        worker.start()
    left = len(tasks)
    while left and time.monotonic() < deadline + _GRACE:
        try:
            yield results.get(timeout=1.0)
            left -= 1
        except Empty:
            if not any(worker.is_alive() for worker in workers):
                break
    for worker in workers:
        worker.join(timeout=1.0)
        if worker.is_alive():
            worker.terminate()


def _serve(work: Work, queue: Any, results: Any, device: str, deadline: float) -> None:
    import torch

    torch.set_num_threads(1)
    while (task := queue.get()) is not None:
        start = time.monotonic()
        if start > deadline:
            results.put(Done(task, 0.0, None, "not begun"))
            continue
        try:
            result, problem = work(task, device, deadline), ""
        except OutOfTime:
            result, problem = None, "out of time"
        except Exception:  # the other tasks go on
            result, problem = None, traceback.format_exc()
        results.put(Done(task, time.monotonic() - start, result, problem))


class Archives:
    """Packed records in archives of at most `limit` bytes each, named STEM_0.zip, STEM_1.zip, ..."""

    def __init__(self, folder: Path, stem: str, limit: int = 15_000_000) -> None:
        self._folder, self._stem, self._limit = folder, stem, limit
        self._number, self._size = 0, 0
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, records: Sequence[Packed]) -> None:
        for name, data in records:
            if self._size + len(data) > self._limit:
                self._number, self._size = self._number + 1, 0
            mode = "a" if self._size else "w"
            with zipfile.ZipFile(self._folder / f"{self._stem}_{self._number}.zip", mode) as archive:
                archive.writestr(f"{name}.npz", data)
            self._size += len(data)
