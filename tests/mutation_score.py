"""The share of planted faults in the kernels that the kernels' tests notice.

    python tests/mutation_score.py --processes 2 --out mutants.json     all, by fuzzed cases, then by the tests
    python tests/mutation_score.py --only masks --fuzzed-only

Each fault is planted in a copy of the tree. There some fuzzed cases and the tests of TESTS run up to the first failure.
PyTorch, Triton and pytest are imported once; each run is a fork of that process. Faults come in random order. A control
without a fault comes last and must survive. A run that takes too long is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[1]
# The strongest first: most runs end in the first file.
TESTS = (
    "test_kernels.py",
    "test_packed.py",
    "test_probe.py",
    "test_odd_inputs.py",
    "test_huge_rows.py",
    "test_fuzz.py",
    "test_invariants.py",
    "test_pointer_loads.py",
    "test_extremes.py",
    "test_fold.py",
)
LEFT_OUT = "not compile and not graph"  # of tests: those that test the compiler
# Which of them are about a file's job, by a part of its name: they run before all others.
FOCUS = {
    "portable/attend": "oracle or cases",
    "softmax": "oracle or sink or split",
    "masks": "walks or window or packed or mask",
    "gradient": "backward",
    "backward": "backward",
    "dq": "backward",
    "dkv": "backward",
    "results": "backward",
    "forward": "strides or oracle",
    "probe": "sample or split",
    "packing": "pack or bounds",
    "fold": "fold",
    "extremes": "extremes",
}
# Nothing is planted: the tests must pass.
CONTROL = Mutant(
    "kernels/portable/forward.py", "Attention output and row statistics", "Attention output, row statistics"
)
QUICK, SLOW = "not slow", "slow and not exhaustive"
FUZZED = range(3000, 3060)  # cases of tests/fuzz.py, which come first
LIMIT = 900  # seconds of one run


def copied_tree(folder: str) -> Path:
    """The tracked files of the checkout, as they are now, in a folder."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, names.stdout.split("\0")):
        if (ROOT / name).is_file() and name.startswith(("hnf_attention/", "kernels/", "tests/", "pyproject")):
            target = Path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)
    return Path(folder)


def fuzz(numbers: range) -> int:
    """Run fuzzed cases of the interpreted kernels up to the first failure: 1 if there is one."""
    import fuzz_run

    run = fuzz_run.Run(engine="kernels", largest=40)
    return int(any(fuzz_run.run_case(run.case(number), run).faults for number in numbers))


def tests(tree: Path, marks: str, names: str = LEFT_OUT) -> int:
    """Run the tests of these marks and names up to the first failure: 0 if all pass."""
    import pytest

    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", marks, "-k", names]
    return int(pytest.main([*options, *(str(tree / "tests" / name) for name in TESTS)]))


def in_a_fork(tree: Path, function: Callable[[], int]) -> str:
    """Run something in a fork, in a tree: "survived", "caught", or "took too long"."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 3
        try:
            os.chdir(tree)
            sys.path[:0] = [str(tree), str(tree / "tests")]
            with open(tree / "log.txt", "w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            status = function()
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    until = time.time() + LIMIT
    while time.time() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "survived" if os.waitstatus_to_exitcode(status) == 0 else "caught"
        time.sleep(0.2)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "took too long"


def judged(tree: Path, mutant: Mutant, fuzzed_only: bool) -> str:
    """What becomes of a mutant: "fuzz" or "tests" caught it, it "survived", or it "took too long"."""
    file = tree / mutant.file
    original = file.read_text(encoding="utf-8")
    _write(file, original.replace(mutant.old, mutant.new))
    focus = [names for part, names in FOCUS.items() if part in mutant.file]
    runs: list[tuple[str, Callable[[], int]]] = [("fuzz", partial(fuzz, FUZZED))]
    if not fuzzed_only:
        runs += [("tests", partial(tests, tree, QUICK, f"({names}) and {LEFT_OUT}")) for names in focus]
        runs += [("tests", partial(tests, tree, marks)) for marks in (QUICK, SLOW)]
    try:
        for name, function in runs:
            result = in_a_fork(tree, function)
            if result != "survived":
                return name if result == "caught" else result
        return "survived"
    finally:
        _write(file, original)


def _write(file: Path, text: str) -> None:
    """Write a source and forget its compiled form: a change within one second would not be seen."""
    file.write_text(text, encoding="utf-8")
    for compiled in file.parent.glob(f"__pycache__/{file.stem}.*"):
        compiled.unlink()


def work(mutants: list[Mutant], fuzzed_only: bool, until: float, write: int) -> None:
    """Judge these mutants in a tree of their own; one line of JSON for each goes to the pipe."""
    with tempfile.TemporaryDirectory() as folder:
        tree = copied_tree(folder)
        for mutant in mutants:
            begin = time.time()
            if begin > until:
                break
            line = {
                "mutant": str(mutant),
                "result": judged(tree, mutant, fuzzed_only),
                "seconds": time.time() - begin,
            }
            os.write(write, (json.dumps(line) + "\n").encode())


def over_processes(mutants: list[Mutant], fuzzed_only: bool, until: float, processes: int) -> list[dict]:
    """`work`, spread over forks; each result is printed as it comes."""
    read, write = os.pipe()
    for process in range(processes):
        if os.fork() == 0:
            os.close(read)
            work(mutants[process::processes], fuzzed_only, until, write)
            os._exit(0)
    os.close(write)
    found = []
    with os.fdopen(read) as lines:
        for line in lines:
            found.append(json.loads(line))
            print(
                f"{found[-1]['result']:<9} {found[-1]['seconds']:5.0f} s  {found[-1]['mutant']}", flush=True
            )
    return found


def preload() -> None:
    """Import what no mutant changes, before the forks."""
    os.environ.update(TRITON_INTERPRET="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    import pytest  # noqa: F401
    import torch
    import triton.language  # noqa: F401

    torch.set_num_threads(1)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="mutants whose file or text has this in it")
    parser.add_argument(
        "--fuzzed-only", action="store_true", help="run fuzzed cases alone: a tenth of the time"
    )
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin with no fault after this time")
    parser.add_argument("--out", help="write the result to this JSON file")
    given = parser.parse_args()
    mutants = [mutant for mutant in MUTANTS if given.only in str(mutant)]
    random.Random(0).shuffle(mutants)
    preload()
    begin = time.time()
    found = over_processes([*mutants, CONTROL], given.fuzzed_only, begin + given.seconds, given.processes)
    control = [line for line in found if line["mutant"] == str(CONTROL)]
    found = [line for line in found if line not in control]
    counts = {name: sum(line["result"] == name for line in found) for name in ("fuzz", "tests", "survived")}
    caught, judged_ones = counts["fuzz"] + counts["tests"], sum(counts.values())
    print(f"{'planted':>8} {'judged':>7} {'by the fuzzer':>14} {'by tests':>9} {'survived':>9} {'caught':>7}")
    print(
        f"{len(mutants):>8} {judged_ones:>7} {counts['fuzz']:>14} {counts['tests']:>9} {counts['survived']:>9} "
        f"{caught / max(1, judged_ones):>7.1%}"
    )
    print("without a fault the tests", *([line["result"] for line in control] or ["were not run"]))
    if given.out:
        Path(given.out).write_text(
            json.dumps({"counts": counts, "mutants": found, "seconds": time.time() - begin})
        )
    return bool(counts["survived"]) or any(line["result"] != "survived" for line in control)


if __name__ == "__main__":
    sys.exit(main())
