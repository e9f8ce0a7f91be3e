"""The plain monitor over processes against one process on the whole batch; and processes that go away."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from hnf_attention import AttentionStabilityMonitor

from .model import WAYS, Setting, Spread, alone, ddp, gathered, logged, net, statistics_difference, train

STEPS = 3
LIMIT = 3.0  # seconds


def monitored(spread: Spread) -> tuple[list[Any], list[Any], list[Any], dict[str, str]]:
    """Snapshots and issues of each step, what was logged and written, and which parts of the monitor are off."""
    optimizer = torch.optim.SGD(spread.model.parameters(), lr=1e-3)
    issues: list[Any] = []
    written: list[Any] = []
    options: dict[str, Any] = {"log_every": 1, "ranks": spread.ranks, "writers": [written.append]}
    with logged() as messages, AttentionStabilityMonitor(spread.model, **options) as monitor:

        def after() -> None:
            diagnosis = monitor.on_step()
            found = [] if diagnosis is None else diagnosis.issues
            issues.append(sorted((x.layer, x.head, x.issue_type) for x in found))

        train(spread, optimizer, STEPS, after)
        off = {name: part.reason for name, part in monitor.status.off.items()}
        return [x.layers for x in monitor.history], issues, messages + written, off


def run(setting: Setting) -> dict[str, Any]:
    """By way of spreading: the largest difference of a statistic, whether issues are equal, and who logs."""
    expected, expected_issues, *_ = monitored(alone(setting, net(setting)))
    found = {}
    for name, way in WAYS.items():
        snapshots, issues, messages, off = monitored(way(setting, net(setting)))
        worst = [statistics_difference(a, b) for a, b in zip(snapshots, expected)]
        everyone = gathered((max(worst), issues == expected_issues, len(messages), off))
        found[name] = {
            "difference": max(x[0] for x in everyone),
            "same_issues": all(x[1] for x in everyone),
            "issues": len(expected_issues[0]),
            "entries_by_rank": [x[2] for x in everyone],  # of the log: a diagnosis a step, and messages
            "off": everyone[0][3],
        }
    return found


def leaving(setting: Setting) -> dict[str, Any]:
    """Process 1 ends its monitor after the first step, or comes too late to the log steps after it."""
    found = {}
    for how in ("killed", "slowed"):
        spread = ddp(setting, net(setting))
        assert spread.ranks is not None
        ranks = replace(spread.ranks, time_limit=LIMIT)
        optimizer = torch.optim.SGD(spread.model.parameters(), lr=1e-3)
        with logged() as messages:
            monitor = AttentionStabilityMonitor(spread.model, log_every=1, ranks=ranks)
            took = []
            for step in range(4):
                train(spread, optimizer, 1)
                if setting.rank == 1 and step == 1:
                    if how == "killed":
                        monitor.restore()
                    else:
                        time.sleep(2 * LIMIT)
                begin = time.monotonic()
                monitor.on_step()
                took.append(time.monotonic() - begin)
            rows = int(monitor.history[-1].layers["layers.0"].rows[0])
            monitor.restore()
            dist.barrier()
        everyone = gathered((took, [x for x in messages if "alone" in x], rows))
        found[how] = {
            "seconds_of_on_step_by_rank": [x[0] for x in everyone],
            "longest_of_others": max(max(x[0]) for rank, x in enumerate(everyone) if rank != 1),
            "messages_by_rank": [len(x[1]) for x in everyone],
            "message": next((x[1][0] for x in everyone if x[1]), None),
            "rows_of_the_last_step_by_rank": [x[2] for x in everyone],
        }
    return found
