"""Sweep the plans of the Hopper forward against SDPA's cuDNN forward, each checked against fp64 first.

    python bench/tune_hopper.py [OUT.json]

Every candidate and the library run interleaved, one event-timed launch each, in shuffled order: the card
changes its clock under load, so only ratios of neighbours mean anything. The winners go into
`kernels/hopper/host.py` by hand: nothing is tuned at run time.
"""

import itertools
import json
import multiprocessing
import random
import statistics
import sys
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch
from machine import machine
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hnf_attention.engine.call import check
from hnf_attention.kernels.hopper import host

ROUNDS = 21
CASES = [
    # head_dim, heads, batch, tokens
    (128, 16, 2, 8192),
    (64, 32, 2, 8192),
    (128, 16, 8, 2048),
    (64, 32, 8, 2048),
    (128, 16, 16, 1024),
    (64, 32, 16, 1024),
]


def plans(head_dim, is_causal):
    """The candidates, and the tuned plan without statistics."""
    tuned = host.plan(head_dim, head_dim, is_causal, False, True, halves=(is_causal, False))
    yield replace(tuned, stats=False)
    for early, by_threes in itertools.product((True, False), repeat=2):
        yield replace(tuned, early=early, by_threes=by_threes)


def inputs(head_dim, heads, batch, tokens, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (batch, heads, tokens, head_dim)
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in "qkv"]


def options(q, k, v, is_causal):
    return check(
        q, k, v, attn_mask=None, is_causal=is_causal, scale=None, window_size=None, softcap=None, sinks=None
    )


def errors(result, q, k, v, is_causal):
    """Relative L2 error of the output, largest absolute errors of the statistics, against fp64."""
    q, k, v = (x.double() for x in (q, k, v))
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if is_causal:
        hidden = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
        low = s.masked_fill(hidden, torch.inf).amin(-1)
        s = s.masked_fill(hidden, -torch.inf)
    else:
        low = s.amin(-1)
    lse = s.logsumexp(-1)
    p = (s - lse[..., None]).exp()
    out = p @ v
    wanted = (lse, torch.special.entr(p).sum(-1), s.amax(-1), low)
    rows = [float((a.double() - b).abs().max()) for a, b in zip(result[1:], wanted)]
    return [float((result[0].double() - out).norm() / out.norm()), *rows]


def build(job):
    """Compile one candidate into the cache on disk, and check it: in a process of its own."""
    head_dim, is_causal, plan = job
    q, k, v = inputs(head_dim, 4, 2, 640)
    try:
        result = host.forward(q, k, v, options(q, k, v, is_causal), plan)
    except Exception as problem:  # a plan that does not build is a result of the sweep
        return [float("nan"), repr(problem)[-200:]]
    return errors(result if plan.stats else result[:2], q, k, v, is_causal)


def main() -> None:
    random.seed(0)
    jobs = [(d, c, plan) for d in (64, 128) for c in (True, False) for plan in plans(d, c)]
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        checked = dict(zip(jobs, pool.map(build, jobs, chunksize=1)))
    worst = {str(j): e for j, e in checked.items() if not (e[0] < 4e-3 and max(e[1:]) < 1e-4)}
    print("wrong:", worst or "none")
    rows = []
    for (head_dim, heads, batch, tokens), is_causal in itertools.product(CASES, (True, False)):
        q, k, v = inputs(head_dim, heads, batch, tokens)
        opts = options(q, k, v, is_causal)

        def library():
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return scaled_dot_product_attention(q, k, v, is_causal=is_causal)  # noqa: B023

        candidates = {"cudnn": library}
        for d, c, plan in jobs:
            if (d, c) == (head_dim, is_causal) and str((d, c, plan)) not in worst:
                candidates[plan] = lambda a=(q, k, v, opts, plan): host.forward(*a)
        times = {name: [] for name in candidates}
        for _ in range(ROUNDS):
            for name in random.sample(list(candidates), len(candidates)):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
                torch.cuda._sleep(2_000_000)  # the host queues the launch while the device waits
                start.record()
                candidates[name]()
                end.record()
                times[name].append((start, end))
        torch.cuda.synchronize()
        medians = {n: statistics.median(a.elapsed_time(b) for a, b in t) for n, t in times.items()}
        base = medians.pop("cudnn")
        best = sorted(medians, key=medians.get)
        label = f"D={head_dim} N={tokens} {'causal' if is_causal else 'full'}"
        shown = " ".join(f"{repr(plan)[5:]} {medians[plan] / base:.3f}x" for plan in best if plan.stats)
        without = [f"{medians[plan] / base:.3f}x" for plan in best if not plan.stats]
        print(f"{label}: cudnn {base:.3f} ms, lse only {without}; {shown}")
        rows += [[label, repr(plan), medians[plan], base] for plan in best]
    if len(sys.argv) > 1:
        document = {
            "machine": machine(),
            "rows": rows,
            "errors": [[list(map(str, j)), e] for j, e in checked.items()],
        }
        Path(sys.argv[1]).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
