"""Many ensembles in several processes, up to a deadline; whatever ended by then is kept."""

from __future__ import annotations

import multiprocessing
import time
import traceback
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty

from .recipes import Recipe
from .record import Packed

_GRACE = 20.0  # seconds past the deadline after which a process that hangs is ended


@dataclass(frozen=True)
class Done:
    """One ensemble that ended. records: packed. problem: why it has none; "" if it has them."""

    name: str
    seconds: float
    records: tuple[Packed, ...]
    problem: str = ""


def run(ensembles: Sequence[Sequence[Recipe]], device: str, processes: int, seconds: float) -> Iterator[Done]:
    """Train the ensembles, each in one of the processes, for `seconds` at most."""
    deadline = time.monotonic() + seconds
    context = multiprocessing.get_context("spawn")
    tasks, results = context.Queue(), context.Queue()
    for ensemble in ensembles:
        tasks.put(list(ensemble))
    for _ in range(processes):
        tasks.put(None)
    arguments = (tasks, results, device, deadline)
    workers = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(processes)]
    for worker in workers:
        worker.start()
    left = len(ensembles)
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


def _work(tasks, results, device: str, deadline: float) -> None:
    import torch

    from . import ordinary, runs
    from .clock import OutOfTime

    torch.set_num_threads(1)
    while (ensemble := tasks.get()) is not None:
        start, name = time.monotonic(), ensemble[0].name.rpartition("-")[0]
        if start > deadline:
            results.put(Done(name, 0.0, (), "not begun"))
            continue
        records: tuple[Packed, ...] = ()
        problem = ""
        try:
            if ensemble[0].architecture:
                found = [ordinary.train(each, device, deadline) for each in ensemble]
            else:
                found = runs.train(ensemble, device, deadline)
            records = tuple((record.recipe.name, record.to_bytes()) for record in found)
        except OutOfTime:
            problem = "out of time"
        except Exception:  # the other ensembles go on
            problem = traceback.format_exc()
        results.put(Done(name, time.monotonic() - start, records, problem))


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
