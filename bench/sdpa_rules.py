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
import sys
import time
import traceback
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import sdpa_single
import torch
from machine import machine
from sdpa_grids import Flash, GridCase, grids, judged, repeats

from hnf_attention.integrations import torch_sdpa

REPEATS = ((64, 4), (128, 4), (64, 2), (256, 4))  # (head dimension, key heads) of the bitwise repeats


def _entered(device: str) -> object:
    """Our kernels under SDPA, in this process, until the object is dropped."""
    torch.set_num_threads(1)
    if device == "cpu":
        return torch_sdpa.Registration("CPU")
    torch_sdpa.activate()
    return None


def run_grid(cases: list[GridCase], device: str, until: float) -> list[dict]:
    """Each case's rule, and by result the largest error as a part of what is allowed."""
    kept, flash, found = _entered(device), Flash(device == "cuda"), []
    for case in cases:
        if time.time() > until:
            break
        line: dict = {"rule": case.rule, "case": str(case)}
        try:
            line["errors"] = judged(case, device, flash)
        except Exception as error:
            line["fault"] = f"{type(error).__name__}: {error}".partition("\n")[0]
        found.append(line)
    del kept
    return found


def run_singles(device: str, until: float) -> list[dict]:
    """The rules of one call each, and the bitwise repeats."""
    kept, found, bench = _entered(device), [], sdpa_single.Bench(device)
    for name, rule in sdpa_single.RULES.items():
        if time.time() > until or (device == "cpu" and name in sdpa_single.ON_CARD):
            continue
        line: dict = {"rule": "single calls", "case": name.replace("_", " ")}
        try:
            torch.manual_seed(0)
            rule(bench)
        except Exception as error:
            line["fault"] = traceback.format_exc(limit=-2) if str(error) else repr(error)
        found.append(line)
    for head_dim, kv_heads in REPEATS:
        times, length = (1000, 1000) if device == "cuda" else (20, 17)
        differ = repeats(head_dim, kv_heads, device, times, length)
        line = {"rule": "bitwise repeats", "case": f"D={head_dim} H=4/{kv_heads}, {times} times"}
        found.append(line | ({"fault": f"{differ} of {times} differ"} if differ else {}))
    del kept
    return found


def groups(cases: list[GridCase]) -> list[list[GridCase]]:
    """Cases that share kernels, largest head dimensions first: one process compiles them."""
    by_kernel = defaultdict(list)
    for case in cases:
        by_kernel[case.head_dim, str(case.dtype), case.masked].append(case)
    return sorted(by_kernel.values(), key=lambda group: -group[0].head_dim * len(group))


def _work(job: tuple[list[GridCase] | None, str, float]) -> list[dict]:
    cases, device, until = job
    return run_singles(device, until) if cases is None else run_grid(cases, device, until)


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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--processes", type=int, default=14)
    parser.add_argument("--seconds", type=float, default=170.0, help="no case starts after this time")
    parser.add_argument("--out", help="write the result to this JSON file")
    given = parser.parse_args()
    begin = time.time()
    until = begin + given.seconds
    cases = list(grids(tiny=given.device == "cpu"))
    planned: dict[str, int] = defaultdict(int)
    for case in cases:
        planned[case.rule] += 1
    singles = len(sdpa_single.RULES) - (0 if given.device == "cuda" else len(sdpa_single.ON_CARD))
    planned |= {"single calls": singles, "bitwise repeats": len(REPEATS)}
    jobs = [(None, given.device, until), *((group, given.device, until) for group in groups(cases))]
    if given.processes == 1:
        lines = [line for job in jobs for line in _work(job)]
    else:
        with ProcessPoolExecutor(given.processes, mp_context=get_context("spawn")) as pool:
            lines = [line for done in pool.map(_work, jobs) for line in done]
    for line in [line for line in lines if broken(line)][:30]:
        worst = {name: round(error, 2) for name, error in line.get("errors", {}).items() if not error <= 1}
        print("broken:", line["case"], worst or "", line.get("fault", ""))
    print(*table(lines, planned), sep="\n")
    print(f"{time.time() - begin:.0f} s")
    if given.out:
        result = {"machine": machine(), "planned": planned, "lines": lines, "seconds": time.time() - begin}
        Path(given.out).write_text(json.dumps(result, indent=1))
    return any(map(broken, lines)) or len(lines) < sum(planned.values())


if __name__ == "__main__":
    sys.exit(main())
