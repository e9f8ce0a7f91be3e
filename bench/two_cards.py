"""The promises that hold over processes: statistics, interventions, processes that go away, rings, and their cost.

    python bench/two_cards.py --out OUT.json                       # on all cards of the machine, over NCCL
    python bench/two_cards.py --processes 2 --tiny --out OUT.json  # tiny sizes, over gloo on a CPU
    python bench/two_cards.py --parts rings --length 131072

Every part runs in processes of its own, one for each card. A part that fails or takes too long is reported, and the
others run. Everything is compared with one process on the whole batch or sequence, on the same kind of device.

- statistics: the plain monitor under DDP, FSDP2, tensor parallelism and the last two together
- leaving: process 1 ends its monitor, or comes too late to log steps
- interventions: QKClip, QK-norm, rewind, and one clip that is reverted, under the same four, by FSDP2 that computes in
  bf16, and on a LLaMA by transformers' own plan for tensor parallelism
- rings: PyTorch's context_parallel and examples/ring_attention.py
- cost: the every-step tier and log steps of a 1B LLaMA under DDP, and the collectives of a log step; needs transformers
"""

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch
import torch.distributed as dist
from cards.model import Setting
from machine import machine

PARTS = {
    "statistics": ("statistics", "run"),
    "leaving": ("statistics", "leaving"),
    "interventions": ("interventions", "run"),
    "rings": ("rings", "run"),
    "cost": ("cost", "run"),
}
LIMIT = 1e-5  # for differences of fp32


def work(rank: int, part: str, folder: str, arguments: argparse.Namespace) -> None:
    """One process of one part."""
    cards = arguments.processes <= torch.cuda.device_count()
    device = torch.device("cuda", rank) if cards else torch.device("cpu")
    if cards:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(arguments.processes)}
    dist.init_process_group(
        "nccl" if cards else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=arguments.processes,
        device_id=device if cards else None,
    )
    module, function = PARTS[part]
    setting = Setting(rank, arguments.processes, device, arguments.length, arguments.tiny)
    try:
        found = getattr(importlib.import_module(f"cards.{module}"), function)(setting)
        if rank == 0:
            Path(folder, "found.json").write_text(json.dumps(found, default=float))
    except Exception:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        raise
    finally:
        if not list(Path(folder).glob("*.error")):  # others may hang in a collective
            dist.destroy_process_group()


def run_part(part: str, arguments: argparse.Namespace) -> dict:
    """What a part found, or {"error": ...}."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        running = torch.multiprocessing.spawn(
            work, (part, folder, arguments), arguments.processes, join=False
        )
        error = None
        try:
            while not running.join(timeout=1.0):
                if time.monotonic() - begin > arguments.seconds:
                    error = f"more than {arguments.seconds} seconds"
                    break
        except Exception as failure:
            error = str(failure).strip().splitlines()[-1]
        finally:
            for process in running.processes:
                process.kill()
        written = sorted(Path(folder).glob("*.error"))
        if written:
            error = written[0].read_text()
        if error is not None:
            return {"error": error}
        return json.loads(Path(folder, "found.json").read_text())


def row(part: str, name: str, numbers: dict, tiny: bool) -> tuple[str, bool | None]:
    """(the numbers as text, whether the promise holds): None where nothing is promised."""
    if "missing" in numbers:
        return f"not run: {numbers['missing']}"[:90], None
    if "refused" in numbers:
        return f"refused: {numbers['refused']}"[:90], False
    if part == "leaving":
        told = max(numbers["messages_by_rank"])
        return f"longest on_step of others {numbers['longest_of_others']:.2f} s, messages {told}", told == 1
    if part == "cost":
        overhead = numbers.get("overhead")
        promised = name == "every_step" and not tiny
        text = f"{numbers['ms']:.2f} ms" + ("" if overhead is None else f", {overhead:+.2%}")
        return text, overhead <= 0.01 if promised else None
    if "difference" not in numbers:
        return ", ".join(f"{key} {value:.2f} ms" for key, value in numbers["ms"].items()), None
    difference = numbers["difference"]
    holds, text = difference <= numbers.get("limit", LIMIT), f"difference {difference:.1e}"
    for what in ("same_issues", "exact"):
        if what in numbers:
            holds &= numbers[what]
            text += f", {what.replace('_', ' ')}: {numbers[what]}"
    if "entries_by_rank" in numbers:  # one process writes and logs for all
        first, *others = numbers["entries_by_rank"]
        text += f", entries of the log by process {[first, *others]}"
        holds &= first > 0 and not any(others)
    if "overhead_every_step" in numbers:
        text += f", step {numbers['overhead_between_log_steps']:+.1%}"
        text += f", log step {numbers['overhead_every_step']:+.1%}"
    return text, holds


def table(results: dict, tiny: bool) -> bool:
    """Print what was found. Returns whether every promise holds."""
    kept = True
    words = {True: "holds", False: "FAILS", None: ""}
    for part, found in results.items():
        if "error" in found:
            print(f"{part:40} {found['error'].strip().splitlines()[-1]:88} FAILS")
            kept = False
            continue
        for name, numbers in found.items():
            text, holds = row(part, name, numbers, tiny)
            print(f"{part + ': ' + name:46} {text:82} {words[holds]}")
            kept &= holds is not False
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--processes", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--length", type=int, help="tokens of a ring's sequence, a multiple of 2 x processes")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--seconds", type=float, default=400.0, help="the most that one part may take")
    arguments = parser.parse_args()
    if arguments.processes < 2:
        parser.error(f"expected at least 2 processes, got {arguments.processes}: give --processes")
    arguments.length = arguments.length or (256 if arguments.tiny else 131072)
    if arguments.length % (2 * arguments.processes):
        parser.error(
            f"expected --length to be a multiple of {2 * arguments.processes}, got {arguments.length}"
        )
    settings = {"processes": arguments.processes, "length": arguments.length, "tiny": arguments.tiny}
    backend = "nccl" if arguments.processes <= torch.cuda.device_count() else "gloo"
    results: dict = {}
    for part in arguments.parts:
        results[part] = run_part(part, arguments)
        print(f"{part}: done", file=sys.stderr)
        if arguments.out is not None:  # after each part, so that a later one loses nothing
            described = {"machine": machine(), "backend": backend, **settings, "results": results}
            arguments.out.write_text(json.dumps(described, indent=1) + "\n")
    sys.exit(not table(results, arguments.tiny))


if __name__ == "__main__":
    main()
