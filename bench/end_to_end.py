"""Whole trainings of four families under a monitor: coverage, exactness, bit-equality and cost. Needs transformers.

    python bench/end_to_end.py --out OUT.json
    python bench/end_to_end.py --device cpu                 # tiny forms, fp32
    python bench/end_to_end.py --parts packs gemma3

- packs: a fine-tune on documents end to end, by trl's SFTTrainer if trl is there, else by transformers' Trainer
- gpt_oss: learned sinks, windows in every second layer, 8 queries a key head, D = 64
- gemma3: windows in every second layer, QK-norm, D = 256
- mla: DeepSeek V3's latent attention, D = 192 and D_v = 128

Each is trained from random weights on the sources of Python's standard library, in bf16 on a card: first with the
attention that transformers trains such models with, then with attn_implementation="hnf_attention". A line fails if

- a layer was not read, or anything is listed as not measured;
- losses or weights are not those of the plain run bit for bit, where two plain runs are equal;
- row or head statistics of the first two layers and the last are further from fp64 than LIMIT;
- the statistics of a pack are further from those of its sequences alone (in fp32) than ALONE.

Times are of steps with a reading every `--steps` steps, and without a monitor, in turns.
"""

import argparse
import json
import os
import sys
import time
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS gives other bits each time

import torch
import transformers
from machine import machine
from trainings import loop, packs
from trainings.recipes import RECIPES

LIMIT = 1e-4  # in units of the exact number, or 1 if that is smaller
ALONE = 1e-3  # products of other shapes are summed in another order, in every layer
PARTS = ["packs", *(name for name in RECIPES if name != "packs")]


def holds(found: dict) -> bool:
    ours = found["ours"]
    return (
        found["layers"] == found["of"] == ours["layers"]
        and not found["not_measured"]
        and not ours["not_measured"]
        and (found["bit_equal"] or not found["repeatable"])
        and max(found["fp64"]["worst"], ours["fp64"]["worst"]) <= LIMIT
        and max((max(x.values()) for x in found.get("alone", {}).values()), default=0.0) <= ALONE
    )


def line(name: str, found: dict) -> str:
    if "error" in found:
        return f"{name:8} FAILS  {found['error'].strip().splitlines()[-1]}"
    ours = found["ours"]
    equal = "bit-equal" if found["bit_equal"] else "not bit-equal"
    if not found["repeatable"]:
        equal += " (nor are two plain runs)"
    times = [
        f"{x['ms']:.1f} ms {x['overhead']:+.1%} (every {x['log_every']})"
        for x in (found["time"], ours["time"])
    ]
    text = (
        f"{name:8} {'holds' if holds(found) else 'FAILS'}  {found['layers']}/{found['of']} layers, {equal}, "
        f"fp64 {found['fp64']['worst']:.0e}, {times[0]}; ours fp64 {ours['fp64']['worst']:.0e}, "
        f"loss {ours['loss_difference']:.0e}, {times[1]}"
    )
    if "alone" in found:
        worst = max(max(x.values()) for x in found["alone"].values())
        text += f"; {found['trainer']}, {found['sequences']} sequences, alone {worst:.0e}"
    return f"{text}; {found['seconds']:.0f} s"


def run_part(name: str, device: torch.device, steps: int) -> dict:
    begin = time.monotonic()
    try:
        found = packs.run(device, steps) if name == "packs" else loop.run(RECIPES[name], device, steps)
    except Exception:
        return {"error": traceback.format_exc()}
    return found | {"seconds": time.monotonic() - begin}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--steps", type=int, help="of a timed turn: 10 on a card, 2 on a CPU")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    steps = arguments.steps or (2 if device.type == "cpu" else 10)
    transformers.logging.set_verbosity_error()
    results: dict = {}
    for name in arguments.parts:
        results[name] = run_part(name, device, steps)
        if "error" in results[name]:
            print(results[name]["error"], file=sys.stderr)
        print(line(name, results[name]), flush=True)
        if arguments.out is not None:  # after each part, so that a later one loses nothing
            described = machine() | {"transformers": transformers.__version__}
            arguments.out.write_text(json.dumps({"machine": described, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
