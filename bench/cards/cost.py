"""What a monitor adds to a step of a 1B LLaMA under DDP, and how long the collectives of a log step take."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import torch
from models import Training
from torch import nn

from hnf_attention import AttentionStabilityMonitor, HeadStats, ProcessGroups
from hnf_attention.monitoring.process_groups import CallName, Part, Reading
from hnf_attention.statistics.fields import NUM_FIELDS
from hnf_attention.statistics.heads import Forwards

from .model import Setting, gathered

VARIANTS: dict[str, dict[str, int] | None] = {
    "plain": None,
    "every_step": {"log_every": 100},
    "logged": {"log_every": 1},
}


def synchronised(setting: Setting) -> float:
    if setting.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def turn(setting: Setting, training: Training, options: dict[str, int] | None, steps: int) -> float:
    """Milliseconds a step of one variant, after two steps that are not timed."""
    training.monitor = None if options is None else AttentionStabilityMonitor(training.model, **options)
    try:
        for _ in range(2):
            training.step()
        begin = synchronised(setting)
        for _ in range(steps):
            training.step()
        return (synchronised(setting) - begin) / steps * 1e3
    finally:
        if training.monitor is not None:
            training.monitor.restore()
            training.monitor = None


def collectives(setting: Setting, layers: int = 16, heads: int = 32, times: int = 20) -> list[float]:
    """Milliseconds of putting together the head statistics of a model, each time after a barrier."""
    ranks = ProcessGroups.of_world()
    values = np.ones((NUM_FIELDS, heads))
    parts = [Part(CallName(str(n)), HeadStats(values.copy(), 64, "bfloat16", 1)) for n in range(layers)]
    found = []
    for _ in range(times if ranks is not None else 0):
        torch.distributed.barrier()
        begin = synchronised(setting)
        ranks.combine(lambda: Reading(list(parts), Forwards(1)))
        found.append((synchronised(setting) - begin) * 1e3)
    return found[2:]


def run(setting: Setting) -> dict[str, Any]:
    """Medians over turns of the slowest process, overheads over the plain step, and the collectives' time."""
    shape, steps, rounds = ((2, 64), 2, 2) if setting.tiny else ((4, 4096), 6, 4)
    training = Training("llama", *shape, tiny=setting.tiny)
    devices = [setting.device.index] if setting.device.type == "cuda" else None
    training.model = nn.parallel.DistributedDataParallel(training.model, device_ids=devices)
    turns: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for number in range(rounds + 1):
        for name in list(VARIANTS)[:: 1 if number % 2 == 0 else -1]:
            took = turn(setting, training, VARIANTS[name], steps if number else 1)
            if number:  # the first round compiles
                turns[name].append(max(gathered(took)))
    found: dict[str, Any] = {name: {"ms": statistics.median(mine)} for name, mine in turns.items()}
    for name in ("every_step", "logged"):
        ratios = [a / b for a, b in zip(turns[name], turns["plain"])]
        found[name]["overhead"] = statistics.median(ratios) - 1
    together = collectives(setting)
    found["collectives"] = {"ms": statistics.median(together) if together else 0.0}
    return found
