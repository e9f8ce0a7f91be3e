"""Experiment 2: failing runs, started again with each fix at the product's own alarm.

    python -m bench.validation.fixes OUT.json [--cases FILE] [--most 40] [--seconds 300] [--policies NAME ...]
    python -m bench.validation.fixes OUT.json --small

FILE: recipes of failures, as `judge --failures FILE` writes them; without it, those that are committed. The reference
is what a configuration can reach: the best final loss over rates, without QK-norm and with it. A fix resolves a
failure if the run ends less than 0.25 nat above that. The alarm is the monitor's first error, or first warning for
the policies whose names begin with W.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import pool, runs
from .clock import OutOfTime
from .harm import final
from .metrics import median, share
from .policies import POLICIES, Case
from .recipes import Recipe
from .single import Training

CASES = Path(__file__).with_name("cases.json")
RATES = (1.0, 0.5, 0.25, 0.125, 0.0625)  # of the recipe's own, for the reference
TOGETHER = 2  # recipes whose references train side by side
RESOLVED = 0.25  # nats above the reference
SMALL = ("untreated", "W: rewind + QK-norm + rate x 0.5")
NOT_FINITE = 1e3  # nats; stands for inf


class Job(NamedTuple):
    """A recipe and the policy that treats it. stable: with QK-norm from the start, where nothing is to be done."""

    recipe: Recipe
    policy: str
    stable: bool = False


def references(recipes: Sequence[Recipe], device: str, deadline: float) -> list[dict[str, float]]:
    """The final losses of recipes of one shape: untreated, of the twin, and the best over rates and both."""
    tried = [replace(x, name=f"{x.name}-{n}", rate=x.rate * r) for x in recipes for n, r in enumerate(RATES)]
    records = runs.train(tried, device, deadline)
    found = []
    for start in range(0, len(records), len(RATES)):
        own = records[start : start + len(RATES)]
        ends = [final(losses) for record in own for losses in (record.losses, record.twin_losses)]
        ends = list(map(_finite, ends))
        found.append({"untreated": ends[0], "twin": ends[1], "reference": min(ends)})
    return found


def _finite(loss: float) -> float:
    """A loss that JSON can hold: a run that broke ends at NOT_FINITE."""
    return min(loss, NOT_FINITE)


def treat(job: Job, device: str, deadline: float) -> dict[str, Any]:
    """Run a job. Returns its final loss, the step of the alarm and what was done."""
    policy, recipe = POLICIES[job.policy], job.recipe.twin if job.stable else job.recipe
    run = Training(recipe, device)
    logging.getLogger("hnf_attention").setLevel(logging.CRITICAL)
    case, after = Case(run), None
    with case.monitor as monitor:
        while run.step < recipe.steps:
            if time.monotonic() > deadline:
                raise OutOfTime(f"{recipe.name}, {job.policy}")
            run.advance()
            diagnosis = monitor.on_step()
            if case.acted is None:
                fires = diagnosis is not None and (
                    diagnosis.has_issues() if policy.tier == "warning" else bool(diagnosis.errors)
                )
                if fires:
                    case.acted = run.step
                    after = policy.act(case, diagnosis)
            elif after is not None:
                after(diagnosis)
    return {"final": _finite(final(run.loss_array())), "acted": case.acted, "done": case.done}


def _work(task: Any, device: str, deadline: float) -> Any:
    return treat(task, device, deadline) if isinstance(task, Job) else references(task, device, deadline)


def table(cases: dict[str, dict[str, Any]], policies: Sequence[str]) -> list[str]:
    """Each policy: how often it resolved a failure, and how often it removed more than half of the excess."""
    lines = []
    for name in policies:
        treated = [case for case in cases.values() if name in case["policies"]]
        excesses = [
            (c["policies"][name]["final"] - c["reference"], c["untreated"] - c["reference"]) for c in treated
        ]
        stable = [c["stable"][name]["final"] - c["twin"] for c in cases.values() if name in c["stable"]]
        lines.append(
            f"{name:42} resolved {share([now < RESOLVED for now, _ in excesses])}; more than half removed "
            f"{share([now < 0.5 * before for now, before in excesses])}; harm on stable twins: median "
            f"{median(stable):+.3f}, worst {max(stable, default=float('nan')):+.3f}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--cases", type=Path, default=CASES)
    parser.add_argument("--most", type=int, default=40)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--stable", nargs="*", choices=POLICIES, default=[])
    parser.add_argument("--processes", type=int, default=14)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not given.small else "cpu"
    start = time.monotonic()
    if given.small:
        given.policies, given.processes = [name for name in SMALL if name in given.policies], 1
    recipes = (_small() if given.small else read_cases(given.cases))[: given.most]
    cases = {x.name: {"recipe": x.to_dict(), "policies": {}, "stable": {}} for x in recipes}
    # References first; then policy by policy, so that those that are done are done on all cases.
    tasks: list[Any] = []
    for _, group in groupby(recipes, key=lambda x: x.shape):
        alike = list(group)  # a few at once, so that the processes have as much to do
        tasks += [alike[n : n + TOGETHER] for n in range(0, len(alike), TOGETHER)]
    tasks += [Job(recipe, policy) for policy in given.policies for recipe in recipes]
    tasks += [Job(recipe, policy, True) for policy in given.stable for recipe in recipes]
    for done in pool.run(_work, tasks, device, given.processes, given.seconds):
        if done.problem:
            if done.problem not in ("not begun", "out of time"):
                print(done.problem, flush=True)
        elif isinstance(done.task, Job):
            kind = "stable" if done.task.stable else "policies"
            cases[done.task.recipe.name][kind][done.task.policy] = done.result
        else:
            for recipe, found in zip(done.task, done.result):
                cases[recipe.name] |= found
    known = {name: case for name, case in cases.items() if "reference" in case}
    failures = {n: c for n, c in known.items() if c["untreated"] - c["reference"] >= RESOLVED}
    print(f"{len(failures)} failures of {len(recipes)} runs in {time.monotonic() - start:.0f} s", flush=True)
    for line in table(failures, given.policies):
        print(line)
    given.out.write_text(json.dumps(failures, indent=1) + "\n")


def read_cases(path: Path) -> list[Recipe]:
    """Recipes of a file that `write_cases` wrote, those of one shape together."""
    found = [Recipe.from_dict(items) for items in json.loads(path.read_text())]
    return sorted(found, key=lambda recipe: recipe.shape)


def _small() -> list[Recipe]:
    base = Recipe("fixes-0", 5, width=32, depth=2, heads=2, kv_heads=2, context=32, batch=8, steps=160)
    base = replace(base, rate=5e-2, warmup=80, log_every=10, clip=0.0, weight_decay=0.0)
    return [replace(base, sharpness=8.0)]


if __name__ == "__main__":
    main()
