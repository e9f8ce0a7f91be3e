"""Experiment 1: train a sweep of recipes with their twins, and record what the monitor saw.

    python -m bench.validation.predict FOLDER --split calibration [--seconds 480] [--processes 6]
    python -m bench.validation.predict FOLDER --small

The records go to FOLDER; `python -m bench.validation.judge FOLDER` judges them, as often as the rules change.
--small: a few small models on the CPU, judged at once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from . import ordinary, pool, runs
from .harm import CLEAN, HARMED, harm
from .recipes import SPLITS, Recipe, ensembles, sweep
from .record import Packed, Record


def packed(recipes: Sequence[Recipe], device: str, deadline: float) -> list[Packed]:
    """The packed records of one ensemble, or of ordinary recipes one after the other."""
    if recipes[0].architecture:
        found = [ordinary.train(recipe, device, deadline) for recipe in recipes]
    else:
        found = runs.train(recipes, device, deadline)
    return [(record.recipe.name, record.to_bytes()) for record in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", choices=SPLITS, nargs="+", default=["calibration"])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", default="", help="ordinary recipes whose names hold this text")
    parser.add_argument("--ensembles", type=int, default=20)
    parser.add_argument("--members", type=int, default=20)
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=480.0)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not given.small else "cpu"
    count, members, processes = given.ensembles, given.members, given.processes
    if given.small:
        count, members, processes = 2, 6, 1
    recipes = []
    for split in given.split:
        if split == "ordinary":
            recipes += [x for x in ordinary.recipes(given.small) if given.only in x.name]
        else:
            # The models of "shift" are larger: half as many at once.
            recipes += sweep(split, count, members // 2 if split == "shift" else members, given.small)
    start, steps, harms = time.monotonic(), 0, []
    archives = pool.Archives(given.folder, "-".join(given.split))
    size = 0
    for done in pool.run(packed, ensembles(recipes), device, processes, given.seconds):
        if done.problem:
            print(f"{done.task[0].name}: {done.problem}", flush=True)
            continue
        archives.add(done.result)
        found = [Record.from_bytes(data) for _, data in done.result]
        size += sum(len(data) for _, data in done.result)
        harms += [harm(record) for record in found]
        steps += sum(record.recipe.steps * (2 if len(record.twin_losses) else 1) for record in found)
        recipe = found[0].recipe
        print(
            f"{recipe.name}: {len(found)} runs of {recipe.depth} x {recipe.width}, {recipe.precision}, read every "
            f"{recipe.log_every}, in {done.seconds:.0f} s; {sum(x >= HARMED for x in harms)} harmed so far",
            flush=True,
        )
    seconds = time.monotonic() - start
    values = np.array(harms)
    print(
        f"{len(values)} of {len(recipes)} runs in {seconds:.0f} s, {steps / seconds:.0f} steps a second, "
        f"{size / max(1, len(values)) / 1000:.0f} kB a run: {(values >= HARMED).sum()} harmed, "
        f"{(values < CLEAN).sum()} clean, {np.isinf(values).sum()} not finite"
    )


if __name__ == "__main__":
    main()
