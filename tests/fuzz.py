"""Random calls of attention against fp64: each is made from a number, so one line replays it.

    python tests/fuzz.py --seed 1234                        one case, in words
    python tests/fuzz.py --cases 20000 --processes 2        PyTorch's path on the CPU
    python tests/fuzz.py --cases 500 --engine kernels       the portable kernels, through Triton's interpreter
    python tests/fuzz.py --cases 200000 --device cuda --processes 16 --kinds 32 --seconds 1200
    python tests/fuzz.py --seeds tests/fuzz_found.txt --cases 0 --device cuda --kinds 32      what failed once

A case is replayed with the options of its run. A case fails if the call raises, writes beside its results, leaves
part of them unwritten, or gives a number that rounding does not explain (`fuzz_oracle`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a checkout that is not installed


def listed(file: str | None) -> list[int]:
    """The seeds in a file: the failures of a result of `--out`, or plain numbers."""
    if file is None:
        return []
    text = Path(file).read_text(encoding="utf-8")
    return (
        [x["seed"] for x in json.loads(text)["failed"]]
        if text.lstrip().startswith("{")
        else [*map(int, text.split())]
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, help="run this one case and print it")
    parser.add_argument(
        "--seeds", help="run these first: a JSON file of an earlier run, its failures; or numbers"
    )
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="the first number")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--engine", choices=("reference", "kernels"), help="on the CPU; a card runs its kernels"
    )
    parser.add_argument(
        "--kinds", type=int, help="how many different problems; few of them compile few kernels"
    )
    parser.add_argument("--largest", type=int, default=65, help="largest number of queries and of keys")
    parser.add_argument("--seconds", type=float, help="stop after this time")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", help="write the result to this JSON file")
    given = parser.parse_args()
    engine = given.engine or ("kernels" if given.device == "cuda" else "reference")
    if given.device == "cuda" and engine == "reference":
        parser.error("expected --engine kernels with --device cuda, got reference")
    if given.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    os.environ["OMP_NUM_THREADS"] = "1"  # tensors are tiny
    import fuzz_run

    run = fuzz_run.Run(given.device, engine, given.kinds, given.largest)
    begin = time.time()
    until = None if given.seconds is None else begin + given.seconds
    if given.seed is not None:
        print(run.case(given.seed))
        numbers = [given.seed]
    else:
        numbers = [*listed(given.seeds), *range(given.first, given.first + given.cases)]
    result = fuzz_run.over_processes(numbers, run, until, given.processes)
    for failure in result["failed"][:20]:
        print(failure["case"], *failure["faults"], failure["replay"], sep="\n    ")
    seconds = time.time() - begin
    print(f"{'cases':>8} {'failed':>7} {'largest error / bound':>22} {'seconds':>8}")
    print(f"{result['ran']:>8} {len(result['failed']):>7} {result['ratio']:>22.3f} {seconds:>8.0f}")
    if given.out:
        Path(given.out).write_text(json.dumps({**asdict(run), **result, "seconds": seconds}, indent=1))
    return bool(result["failed"])


if __name__ == "__main__":
    sys.exit(main())
