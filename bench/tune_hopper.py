"""Sweep what tunes the plans of the Hopper forward, beside the plans in use, in one run and in shuffled order.

    python bench/tune_hopper.py [OUT.json]

bf16, 16k tokens, model width 2048. Each number is the median of 21 launches. Outputs must agree with the portable
forward's. The winners go into `kernels/hopper/host.py` by hand: nothing is tuned at run time.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import sys
import traceback
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch
from hopper_intervals import RAGGED, drawn, options_of, ours, times
from machine import machine
from suite import HEADS, TOKENS

from hnf_attention.kernels.hopper import host
from hnf_attention.kernels.portable import forward as portable

KINDS = {  # length, keywords of a call
    "causal": (2048, {}),
    "long causal": (TOKENS, {}),
    "full": (4096, {"is_causal": False}),
    "window": (8192, {"window_size": 1024}),
    "pack": (TOKENS, {"seqlens": RAGGED}),
}


def call_of(head_dim, kind):
    """(q, k, v, keywords of a call) of one kind."""
    length, given = KINDS[kind]
    if "seqlens" in given:
        given = {"seqlens": torch.tensor(given["seqlens"], dtype=torch.int32, device="cuda")}
    return *drawn(TOKENS // length, HEADS[head_dim], length, head_dim), given


def candidates(head_dim, kind):
    """The plan in use, then the others."""
    q, k, v, given = call_of(head_dim, kind)
    used = host.plan_of(q, k, v, options_of(q, k, v, **given))
    stages = (3, 4) if head_dim == 64 else (used.stages,)
    fields = "early", "by_threes", "shared_unit", "stages"
    others = itertools.product((False, True), (False, True), (False, True), stages)
    return list(dict.fromkeys([used, *(replace(used, **dict(zip(fields, values))) for values in others)]))


def launch(plan):
    return lambda q, k, v, options: host.forward(q, k, v, options, plan)


def build(job):
    """Compile one candidate into the cache on disk, in a process of its own; returns what went wrong."""
    head_dim, kind, plan = job
    try:
        q, k, v, given = call_of(head_dim, kind)
        ours(q, k, v, launch(plan), **given)()
        torch.cuda.synchronize()
        return None
    except Exception:  # a plan that does not build is a result of the sweep
        return traceback.format_exc()[-200:]


def main() -> None:
    jobs = [(d, kind, plan) for d in (64, 128) for kind in KINDS for plan in candidates(d, kind)]
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        wrong = {job: text for job, text in zip(jobs, pool.map(build, jobs, chunksize=1)) if text}
    rows = [{"plan": repr(job), "wrong": text} for job, text in wrong.items()]
    for head_dim, kind in itertools.product((64, 128), KINDS):
        plans = [plan for d, name, plan in jobs if (d, name) == (head_dim, kind)]
        q, k, v, given = call_of(head_dim, kind)
        calls = {"portable": ours(q, k, v, portable.forward, **given)}
        calls |= {
            repr(plan): ours(q, k, v, launch(plan), **given)
            for plan in plans
            if (head_dim, kind, plan) not in wrong
        }
        found = times(calls, tuple(calls)[1:])
        used = found[repr(plans[0])]
        rows.append({"case": f"{kind}, D={head_dim}", "used": repr(plans[0]), "ms": found})
        best = sorted(found, key=found.get)[:4]
        print(
            f"{kind}, D={head_dim}: {used:.3f} ms;",
            ", ".join(f"{name} {found[name] / used:.3f}x" for name in best),
            flush=True,
        )
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
