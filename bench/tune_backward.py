"""Sweep tile shapes of the backward against SDPA's flash and cuDNN backwards; prints the best per case.

    python bench/tune_backward.py [OUT.json]

Every candidate is compiled by spawned processes, which also judge its gradients against fp64 on a small
shape; what is wrong, spills or does not fit is not timed. The winners go into `kernels/configs.py` by
hand: nothing is tuned at run time.
"""

import itertools
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from machine import machine
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hnf_attention.engine.call import check
from hnf_attention.kernels.portable.backward import backward, prepare
from hnf_attention.kernels.portable.forward import forward
from hnf_attention.kernels.shared.tiles import Tiles
from hnf_attention.reference import attention as reference

BATCH, TOKENS, HEADS = 2, 8192, {64: 32, 128: 16}
KERNELS = ("dq", "dkv")
# Left out after a look at the compiler's output: whatever spills inside the unmasked loop. Register limits
# of 168 let three programs of four warps share an SM.
TILES = {
    ("dq", 64): [
        Tiles(64, 64, 4, 2),
        Tiles(64, 64, 4, 3),
        Tiles(64, 32, 4, 3),
        Tiles(64, 128, 4, 2),
        Tiles(128, 64, 8, 2),
        Tiles(128, 64, 8, 3),
        Tiles(128, 128, 8, 2),
        Tiles(128, 64, 4, 2),
    ],
    ("dkv", 64): [
        Tiles(64, 64, 4, 2),
        Tiles(64, 64, 4, 2, 168),
        Tiles(64, 64, 4, 3),
        Tiles(64, 64, 8, 2),
        Tiles(32, 64, 4, 2),
        Tiles(32, 64, 4, 3),
        Tiles(64, 128, 8, 2),
        Tiles(64, 128, 8, 3),
        Tiles(32, 128, 8, 3),
        Tiles(32, 128, 4, 2),
    ],
    ("dq", 128): [
        Tiles(64, 64, 4, 2),
        Tiles(64, 64, 4, 1),
        Tiles(64, 64, 4, 1, 168),
        Tiles(64, 32, 4, 2),
        Tiles(64, 32, 4, 3),
        Tiles(64, 128, 4, 1),
        Tiles(128, 64, 8, 2),
        Tiles(128, 64, 8, 3),
        Tiles(128, 128, 8, 1),
        Tiles(128, 128, 8, 2),
    ],
    ("dkv", 128): [
        Tiles(64, 64, 4, 2),
        Tiles(64, 64, 8, 2),
        Tiles(32, 64, 4, 2),
        Tiles(32, 64, 4, 3),
        Tiles(64, 128, 8, 2),
        Tiles(64, 128, 8, 3),
        Tiles(32, 128, 8, 3),
        Tiles(32, 128, 8, 4),
    ],
}
CASES = list(itertools.product((128, 64), (True, False), (False, True)))  # head_dim, causal, with entropy
# Relative L2 error against fp64; bf16 rounding of P and dS alone gives 3e-3.
TOLERANCE = 1e-2
# 32-bit words per thread, as the loader reports them; a few outside the unmasked loop cost nothing.
SPILLS = 32


def problem(batch, heads, tokens, head_dim, causal, entropy):
    """(q, k, v, options, out, lse, entropy, d_out, d_lse, d_entropy), what `backward` takes."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape, dtype=torch.bfloat16):
        return torch.randn(*shape, device="cuda", generator=generator).to(dtype)

    q, k, v, d_out = (draw(batch, heads, tokens, head_dim) for _ in range(4))
    options = check(
        q, k, v, attn_mask=None, is_causal=causal, scale=None, window_size=None, softcap=None, sinks=None
    )
    out, lse, row_entropy, *_ = forward(q, k, v, options)
    rows = [draw(batch, heads, tokens, dtype=torch.float32) if entropy else None for _ in range(2)]
    return q, k, v, options, out, lse, row_entropy, d_out, *rows


@lru_cache(maxsize=1)
def small(head_dim, causal, entropy):
    """A problem whose sizes divide like the timed one's, so that its kernels are the same; and fp64's answer."""
    arguments = problem(1, 16, 512, head_dim, causal, entropy)
    q, k, v, options, _, _, _, d_out, *rows = arguments
    exact = [x.double() for x in (q, k, v)]
    out, stats = reference.attention(*exact, options)
    more = (None if x is None else x.double() for x in (d_out, *rows))
    return arguments, reference.backward(*exact, options, out, stats.lse, stats.entropy, *more)


def compile_and_judge(job):
    """{registers, spills, shared, error} of one candidate, or {problem}."""
    kernel, tiles, case = job
    try:
        arguments, expected = small(*case)
        # The other kernel is not launched, and its own tiles are of no interest.
        gradients, launches = prepare(*arguments, (tiles, tiles))
        compiled = launches[KERNELS.index(kernel)]()
        names = ("query",) if kernel == "dq" else ("key", "value")
        errors = [
            float((getattr(gradients, n).double() - (true := getattr(expected, n))).norm() / true.norm())
            for n in names
        ]
        return {
            "registers": compiled.n_regs,
            "spills": compiled.n_spills,
            "shared": compiled.metadata.shared,
            "error": max(errors),
        }
    except Exception as trouble:  # a tile that does not fit is a result of the sweep
        return {"problem": repr(trouble)[:120]}


def milliseconds(fn):
    return triton.testing.do_bench(fn, warmup=10, rep=40, return_mode="median")


def library(backend, q, k, v, causal, d_out):
    """Milliseconds of the backward of SDPA with this backend."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(backend):
        out = scaled_dot_product_attention(*leaves, is_causal=causal)
    return milliseconds(lambda: torch.autograd.grad(out, leaves, d_out, retain_graph=True))


def sweep(case, judged):
    """Time what is good for this case; returns its record."""
    head_dim, causal, entropy = case
    arguments = problem(BATCH, HEADS[head_dim], TOKENS, head_dim, causal, entropy)
    record = {"head_dim": head_dim, "causal": causal, "entropy": entropy, "rows": []}
    best = {}
    for kernel in KERNELS:
        rows = []
        for tiles in TILES[kernel, head_dim]:
            row = {"kernel": kernel, "tiles": list(tiles), **judged[kernel, tiles, case]}
            if "problem" not in row and row["error"] < TOLERANCE and row["spills"] <= SPILLS:
                launch = prepare(*arguments, (tiles, tiles))[1][KERNELS.index(kernel)]
                row["ms"] = milliseconds(launch)
                rows.append(row)
            record["rows"].append(row)
        rows.sort(key=lambda row: row["ms"])
        best[kernel] = rows[:3]
    if not all(best.values()):
        print(case, "no candidate is right and fits", flush=True)
        return record
    pair = [Tiles(*best[kernel][0]["tiles"]) for kernel in KERNELS]
    q, k, v, *_, d_out, _, _ = arguments
    record["ours_ms"] = milliseconds(lambda: backward(*arguments, pair))
    record["flash_ms"] = library(SDPBackend.FLASH_ATTENTION, q, k, v, causal, d_out)
    record["cudnn_ms"] = library(SDPBackend.CUDNN_ATTENTION, q, k, v, causal, d_out)
    # Five products of 2 M N D operations each; a causal mask leaves half.
    flops = 5 * 2 * BATCH * HEADS[head_dim] * TOKENS**2 * head_dim * (0.5 if causal else 1.0)
    print(
        f"D={head_dim} {'causal' if causal else 'full'}{' +entropy' if entropy else ''}: "
        f"ours {record['ours_ms']:.2f} ms ({flops / record['ours_ms'] / 1e9:.0f} TFLOP/s), "
        f"{record['ours_ms'] / record['flash_ms']:.2f}x flash {record['flash_ms']:.2f}, "
        f"{record['ours_ms'] / record['cudnn_ms']:.2f}x cuDNN {record['cudnn_ms']:.2f}"
    )
    for kernel in KERNELS:
        print(
            f"  {kernel:3}",
            "; ".join(f"{tuple(r['tiles'])} {r['ms']:.2f} ms" for r in best[kernel]),
            flush=True,
        )
    return record


def main() -> None:
    begin = time.perf_counter()
    jobs = [(kernel, tiles, case) for case in CASES for kernel in KERNELS for tiles in TILES[kernel, case[0]]]
    # Spawned before this process touches the device; neighbouring jobs share a case and its fp64 answer.
    with ProcessPoolExecutor(min(16, os.cpu_count()), mp_context=get_context("spawn")) as pool:
        judged = dict(zip(jobs, pool.map(compile_and_judge, jobs, chunksize=5), strict=True))
    print(f"{machine()['device']}: {len(jobs)} candidates compiled in {time.perf_counter() - begin:.0f} s")
    wrong = [(job, result) for job, result in judged.items() if result.get("error", 0.0) >= TOLERANCE]
    for (kernel, tiles, case), result in wrong:
        print(f"WRONG {kernel} {tuple(tiles)} {case}: error {result['error']:.1e}")
    records = [sweep(case, judged) for case in CASES]
    dropped = [(job, result) for job, result in judged.items() if "problem" in result]
    print(
        f"{len(dropped)} did not run", *sorted({result["problem"] for _, result in dropped})[:4], sep="\n  "
    )
    print(f"{time.perf_counter() - begin:.0f} s in all")
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps({"machine": machine(), "cases": records}, indent=1))


if __name__ == "__main__":
    main()
