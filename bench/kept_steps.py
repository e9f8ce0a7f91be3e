"""What the extremes of every step cost the host, where it decides: GPT-2 124M, one sequence a step.

    python bench/kept_steps.py --out bench/results/NAME.json

Blocks of steps of a plain model and of a monitored one take turns. Printed are the wall time, and the processor time of
the thread that trains, which other processes disturb less. The first two steps of a block do not count.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch
from machine import machine
from transformers import GPT2Config, GPT2LMHeadModel

from hnf_attention import AttentionStabilityMonitor

LENGTHS, ROUNDS, STEPS, LEFT_OUT = (1024, 4096), 8, 8, 2


def step(run: dict[str, Any], monitor: AttentionStabilityMonitor | None) -> tuple[float, float]:
    """Wall and processor time of one training step, in seconds; waiting for the device is wall time only."""
    wall, thread = time.perf_counter(), time.thread_time()
    run["model"](input_ids=run["tokens"], labels=run["tokens"]).loss.backward()
    run["optimizer"].step()
    run["optimizer"].zero_grad()
    if monitor is not None:
        monitor.on_step()
    thread = time.thread_time() - thread
    torch.cuda.synchronize()
    return time.perf_counter() - wall, thread


def compare(length: int) -> dict[str, float]:
    """Medians in ms of the plain step and of the monitored one."""
    torch.manual_seed(0)
    config = GPT2Config(n_positions=length, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = GPT2LMHeadModel(config).to("cuda", torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens = torch.randint(config.vocab_size, (1, length), device="cuda")
    run = {"model": model, "optimizer": optimizer, "tokens": tokens}
    times: dict[str, list[tuple[float, float]]] = {"plain": [], "monitored": []}
    for _ in range(ROUNDS):
        times["plain"] += [step(run, None) for _ in range(STEPS)][LEFT_OUT:]
        with AttentionStabilityMonitor(model, log_every=10**9) as monitor:
            times["monitored"] += [step(run, monitor) for _ in range(STEPS)][LEFT_OUT:]
    return {
        f"{name}_{kind}_ms": 1e3 * statistics.median(found[place] for found in times[name])
        for name in times
        for place, kind in enumerate(("wall", "thread"))
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    document = {"machine": machine(), "kept_steps": []}
    for length in LENGTHS:
        found = compare(length)
        document["kept_steps"].append({"tokens": length} | found)
        print(f"1 x {length}:", *(f"{name} {ms:.2f}" for name, ms in found.items()), flush=True)
        if given.out is not None:
            given.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
