"""PyTorch's SDPA tests and FlashAttention's numeric rules, run against this project's kernels on a card.

    python bench/sdpa_rules.py --out bench/results/sdpa_rules_NAME.json     a card, some 150 s
    python bench/sdpa_rules.py --device cpu                                 some small cases by the PyTorch path

Calls go through `scaled_dot_product_attention`, after `torch_sdpa.activate()`, where SDPA's flash kernel takes them,
and through `attention` elsewhere (masks, fp32, other value widths). Every call of the flash kernel is checked to be
ours. Not expressed: dropout, which stays PyTorch's; which kernel PyTorch chooses; warnings of other kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import sys
import time
from collections import defaultdict
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import sdpa_single
import torch
from machine import machine
from sdpa_grids import Flash, GridCase, grids, judged, repeats

from hnf_attention.integrations import torch_sdpa

REPEATS = ((64, 4), (128, 4), (64, 2), (256, 4))  # (head dimension, key heads) of the bitwise repeats
Job = GridCase | str | tuple[int, int]  # a case of a grid, a rule of one call, or bitwise repeats
WRITE_EVERY = 5.0  # seconds between two versions of the result's file


def run_job(job: Job, device: str, flash: Flash) -> dict:
    """One line of the result: the rule, the case, and its errors as parts of what is allowed, or its fault."""
    line: dict
    try:
        if isinstance(job, GridCase):
            line = {"rule": job.rule, "case": str(job)}
            return line | {"errors": judged(job, device, flash)}
        if isinstance(job, str):
            line = {"rule": "single calls", "case": job.replace("_", " ")}
            torch.manual_seed(0)
            sdpa_single.RULES[job](sdpa_single.Bench(device))
            return line
        times, length = (1000, 1000) if device == "cuda" else (20, 17)
        line = {"rule": "bitwise repeats", "case": f"D={job[0]} H=4/{job[1]}, {times} times"}
        differ = repeats(*job, device, times, length)
        return line | ({"fault": f"{differ} of {times} differ"} if differ else {})
    except Exception as error:
        return line | {"fault": " ".join(f"{type(error).__name__}: {error}".split())[:300]}


def work(jobs: list[Job], device: str, lines: Queue) -> None:
    """Run jobs in this process, with our kernels under SDPA; each line goes to the queue as it comes."""
    torch.set_num_threads(1)
    kept = torch_sdpa.Registration("CPU") if device == "cpu" else torch_sdpa.activate()
    flash = Flash(device == "cuda")
    for job in jobs:
        lines.put(run_job(job, device, flash))
    del kept


def shared_out(device: str, processes: int) -> list[list[Job]]:
    """The jobs of each process: those that share kernels go to one, and some of each rule come first."""
    shuffled, groups = random.Random(0), defaultdict(list)
    for case in grids(tiny=device == "cpu"):
        groups[case.head_dim, str(case.dtype), case.masked].append(case)
    first: list[list[Job]] = [[] for _ in range(processes)]
    later: list[list[Job]] = [[] for _ in range(processes)]
    for number, group in enumerate(
        sorted(groups.values(), key=lambda group: -group[0].head_dim * len(group))
    ):
        shuffled.shuffle(group)
        rules = {case.rule: case for case in group}
        first[number % processes] += rules.values()
        later[number % processes] += [case for case in group if case is not rules[case.rule]]
    singles = [name for name in sdpa_single.RULES if device == "cuda" or name not in sdpa_single.ON_CARD]
    for number, job in enumerate([*REPEATS, *singles]):
        first[-1 - number % processes].append(job)
    for jobs in later:
        shuffled.shuffle(jobs)
    return [start + rest for start, rest in zip(first, later)]


def table(lines: list[dict], planned: dict[str, int]) -> list[str]:
    """By rule: cases, of how many, how many broke it, and the largest error as a part of what is allowed."""
    rows = [f"{'rule':<16} {'ran':>6} {'of':>6} {'broken':>7} {'largest error / allowed':>24}"]
    for rule, count in planned.items():
        mine = [line for line in lines if line["rule"] == rule]
        largest = max((max(line["errors"].values()) for line in mine if line.get("errors")), default=None)
        shown = "" if largest is None else f"{largest:.3f}"
        rows.append(f"{rule:<16} {len(mine):>6} {count:>6} {sum(map(broken, mine)):>7} {shown:>24}")
    return rows


def broken(line: dict) -> bool:
    return "fault" in line or any(not error <= 1 for error in line.get("errors", {}).values())


def as_json(known: dict, lines: list[dict]) -> str:
    """The result's file, a case a line."""
    rounded = [
        line | {"errors": {name: float(f"{x:.4g}") for name, x in line["errors"].items()}}
        if "errors" in line
        else line
        for line in lines
    ]
    head = json.dumps(known, indent=1).removesuffix("\n}")
    return f'{head},\n "lines": [\n' + ",\n".join(map(json.dumps, rounded)) + "\n]}\n"


def planned(jobs: list[list[Job]]) -> dict[str, int]:
    """How many jobs each rule has."""
    found: dict[str, int] = defaultdict(int)
    for job in (job for part in jobs for job in part):
        kind = "single calls" if isinstance(job, str) else "bitwise repeats"
        found[job.rule if isinstance(job, GridCase) else kind] += 1
    return dict(sorted(found.items()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--processes", type=int, default=14)
    parser.add_argument("--seconds", type=float, default=190.0, help="end after this time, whatever is left")
    parser.add_argument("--out", help="write the result to this JSON file, again and again")
    given = parser.parse_args()
    begin = written = time.time()
    jobs, lines, context = shared_out(given.device, given.processes), [], get_context("spawn")
    counts, made = planned(jobs), context.Queue()
    workers = [
        context.Process(target=work, args=(part, given.device, made), daemon=True) for part in jobs if part
    ]
    for worker in workers:
        worker.start()

    def write() -> None:
        if given.out:
            known = {"machine": machine(), "planned": counts, "seconds": round(time.time() - begin)}
            Path(given.out).write_text(as_json(known, lines))

    while len(lines) < sum(counts.values()) and time.time() - begin < given.seconds:
        try:
            lines.append(made.get(timeout=1.0))
        except queue.Empty:
            if not any(worker.is_alive() for worker in workers):
                break
            continue
        if broken(lines[-1]):
            worst = {name: round(x, 2) for name, x in lines[-1].get("errors", {}).items() if not x <= 1}
            print("broken:", lines[-1]["case"], worst or "", lines[-1].get("fault", ""), flush=True)
        if time.time() - written > WRITE_EVERY:
            written = time.time()
            write()
    ended = [worker.exitcode for worker in workers if worker.exitcode]
    for worker in workers:
        worker.kill()
    write()
    print(*table(lines, counts), sep="\n")
    print(
        f"{time.time() - begin:.0f} s; processes that ended by themselves with a fault: {ended or 'none'}",
        flush=True,
    )
    os._exit(any(map(broken, lines)) or bool(ended) or len(lines) < sum(counts.values()))


if __name__ == "__main__":
    main()
