"""Sweep what tunes the plans of the Hopper forward, beside the plans in use, in one run and in shuffled order.

    python bench/tune_hopper.py [OUT.json]

bf16, 16k tokens, model width 2048. Each number is the median of 21 launches. A plan whose output or row statistics
differ from the portable forward's is left out, and the result says so. The winners go into `kernels/hopper/host.py` by
hand: nothing is tuned at run time.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import random
import sys
import traceback
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch
from hopper_intervals import LARGEST_ERROR, RAGGED, drawn, error, options_of, times
from hopper_versions import LARGEST_ROW_ERROR
from machine import machine
from suite import HEADS, TOKENS

from hnf_attention.kernels.hopper import host
from hnf_attention.kernels.portable import forward as portable

WIDTHS = (64, 128)
KINDS = {  # length, keywords of a call
    "causal": (2048, {}),
    "long causal": (TOKENS, {}),
    "full": (4096, {"is_causal": False}),
    "window": (8192, {"window_size": 1024}),
    "pack": (TOKENS, {"seqlens": RAGGED}),
    "pack, window": (TOKENS, {"seqlens": RAGGED, "window_size": 1024}),
}


def call_of(head_dim, kind):
    """(q, k, v, options) of one kind."""
    length, given = KINDS[kind]
    if "seqlens" in given:
        given = given | {"seqlens": torch.tensor(given["seqlens"], dtype=torch.int32, device="cuda")}
    q, k, v = drawn(TOKENS // length, HEADS[head_dim], length, head_dim)
    return q, k, v, options_of(q, k, v, **given)


def candidates(head_dim, kind):
    """The plan in use, then the others."""
    used = host.plan_of(*call_of(head_dim, kind))
    stages = (3, 4) if head_dim == 64 else (used.stages,)
    fields = "early", "by_threes", "shared_unit", "stages"
    others = itertools.product((False, True), (False, True), (False, True), stages)
    return list(dict.fromkeys([used, *(replace(used, **dict(zip(fields, values))) for values in others)]))


def build(job):
    """Compile one candidate into the cache on disk, in a process of its own; returns what is wrong with it, or None."""
    head_dim, kind, plan = job
    try:
        call = call_of(head_dim, kind)
        pairs = zip(host.forward(*call, plan)[:5], portable.forward(*call)[:5])
        out, *rows = (error(*pair) for pair in pairs)
    except Exception:  # a plan that does not build is a result of the sweep
        return traceback.format_exc()[-200:]
    if out < LARGEST_ERROR and max(rows) < LARGEST_ROW_ERROR:
        return None
    return f"off by {out:.1e}, {max(rows):.1e}"


def main() -> None:
    random.seed(0)
    jobs = [(d, kind, plan) for d in WIDTHS for kind in KINDS for plan in candidates(d, kind)]
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        wrong = {job: text for job, text in zip(jobs, pool.map(build, jobs, chunksize=1)) if text}
    rows = []
    for head_dim, kind in itertools.product(WIDTHS, KINDS):
        plans = [plan for d, name, plan in jobs if (d, name) == (head_dim, kind)]
        left_out = {
            repr(plan): wrong[head_dim, kind, plan] for plan in plans if (head_dim, kind, plan) in wrong
        }
        call = call_of(head_dim, kind)
        calls = {
            repr(plan): lambda plan=plan, call=call: host.forward(*call, plan)[0]
            for plan in plans
            if repr(plan) not in left_out
        }
        found, used = times(calls) if calls else {}, repr(plans[0])
        rows.append({"case": f"{kind}, D={head_dim}", "used": used, "ms": found, "left out": left_out})
        best = sorted(found, key=found.get)[:4]
        shown = (f"{name} {found[name] / found.get(used, found[best[0]]):.3f}x" for name in best)
        print(f"{kind}, D={head_dim}: {len(left_out)} left out; used {used};", ", ".join(shown), flush=True)
        if len(sys.argv) > 1:
            Path(sys.argv[1]).write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
