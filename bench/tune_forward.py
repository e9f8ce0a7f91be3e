"""Sweep tile shapes of the portable forward against SDPA's cuDNN forward; prints the best per case.

    python bench/tune_forward.py [OUT.json]

The winners go into `kernels/configs.py` by hand: nothing is tuned at run time.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hnf_attention.engine.call import check
from hnf_attention.kernels.portable.forward import forward
from hnf_attention.kernels.shared.tiles import Tiles

CASES = [
    # head_dim, heads, batch, tokens, causal
    (128, 16, 2, 8192, True),
    (128, 16, 2, 8192, False),
    (64, 32, 2, 8192, True),
    (64, 32, 2, 8192, False),
    (128, 16, 8, 2048, True),
    (64, 32, 8, 2048, True),
]
TILES = [
    Tiles(m, n, w, s)
    for m, n in ((128, 128), (128, 64), (64, 128), (64, 64), (128, 32))
    for w in (4, 8)
    for s in (2, 3, 4)
]


def main() -> None:
    results = []
    for head_dim, heads, batch, tokens, causal in CASES:
        torch.manual_seed(0)
        q, k, v = (
            torch.randn(batch, heads, tokens, head_dim, device="cuda", dtype=torch.bfloat16) for _ in "qkv"
        )
        options = check(
            q, k, v, attn_mask=None, is_causal=causal, scale=None, window_size=None, softcap=None, sinks=None
        )

        def library(q=q, k=k, v=v, causal=causal):
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return scaled_dot_product_attention(q, k, v, is_causal=causal)

        def time(fn):
            return triton.testing.do_bench(fn, warmup=10, rep=60, return_mode="median")

        expected = library()
        for tiles in TILES:
            if tiles.block_m == 64 and tiles.num_warps == 8:
                continue
            if tiles.block_m * tiles.block_n * head_dim > 128 * 128 * 64 and tiles.num_warps == 4:
                continue  # spills
            row = {"case": [head_dim, heads, batch, tokens, causal], "tiles": list(tiles)}
            try:
                out = forward(q, k, v, options, tiles)[0]
                row["error"] = float((out.float() - expected.float()).norm() / expected.float().norm())
                base = time(library)
                row["ms"] = time(lambda t=tiles, o=options, a=(q, k, v): forward(*a, o, t))
                row["cudnn_ms"] = base
                row["ratio"] = row["ms"] / base
            except Exception as problem:  # a tile that does not fit is a result of the sweep
                row["problem"] = repr(problem)[:120]
            results.append(row)
        good = sorted(
            (
                r
                for r in results
                if r["case"][0] == head_dim and r["case"][3:] == [tokens, causal] and "ratio" in r
            ),
            key=lambda r: r["ratio"],
        )
        for r in good[:4]:
            print(
                r["case"],
                r["tiles"],
                f"{r['ms']:.3f} ms {r['ratio']:.3f}x cuDNN {r['cudnn_ms']:.3f} error {r['error']:.1e}",
                flush=True,
            )
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
