"""The probe and the extended statistics on the GPU at hand, timed beside SDPA.

    python bench/probe.py [--check] [--sweep] [--lengths 8192] [--out OUT.json]

Work of a probe of all rows: 2 * B * H * M * N * D floating-point operations (one product), half of that
under a causal mask, so half of the forward's; a probe of 1/16 of the rows does 3.1% of the forward's.
Times are medians of CUDA graphs, free of the host's part of a launch; inputs random bf16, B * N = 16k tokens.
"beside" is SDPA followed by the probe of 1/16 of the rows, over SDPA alone: the target is 1.06 at N >= 8k.
--check compares 72 cases with fp64 first (minutes of compiling). --sweep times tile shapes of the probe as well;
winners go into `kernels/configs.py` by hand.
"""

import argparse
import json
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(root), str(root / "tests"), str(root / "bench")]

import torch
from cases import EXTENDED, Case
from machine import machine
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench_cudagraph

from hnf_attention import attention, attention_stats
from hnf_attention.kernels.portable import probe
from hnf_attention.kernels.shared.tiles import Tiles
from hnf_attention.reference import attention as reference
from hnf_attention.reference import masks, sampling

TOKENS, PERIOD = 16384, 16
TIMED = [
    (head_dim, heads, length, is_causal)
    for head_dim, heads in ((64, 32), (128, 16))
    for length in (2048, 8192, 16384)
    for is_causal in (True, False)
]
NAMES = ("lse", "entropy", "max_logit", "min_logit", *EXTENDED)
CHECKED = {
    "plain": Case(2, 2, 2, 1100, 1100),
    "causal": Case(2, 2, 2, 1100, 1100, is_causal=True),
    "causal window": Case(2, 2, 2, 1100, 1100, is_causal=True, window_size=200),
    "sinks": Case(2, 2, 2, 700, 1100, sinks=True),
    "bool mask": Case(2, 2, 2, 333, 500, mask="rows", sinks=True),
    "additive mask, soft-cap": Case(2, 2, 2, 333, 500, mask="additive", softcap=2.0),
}
TILES = [Tiles(64, n, 4, s) for n in (32, 64, 128, 256) for s in (2, 3, 4)]


def errors(case: Case, dtype: torch.dtype) -> dict[str, float]:
    """Largest difference from fp64, relative to the largest value or 1, over fused, probe and samples."""
    tensors = case.tensors(dtype, "cuda")
    query, key, value = tensors[:3]
    keywords = case.keywords(*tensors[3:])
    exact = reference.attention(
        query.double(), key.double(), None, case.options(query, key, value, *tensors[3:]), extended=True
    )[1]
    worst = dict.fromkeys(NAMES, 0.0)

    def compare(rows, index=None) -> None:
        for name in NAMES:
            got, wanted = getattr(rows, name).double(), getattr(exact, name)
            if index is not None:
                wanted = masks.take_rows(wanted, index)
                got, wanted = (torch.where(index >= 0, x, 0.0) for x in (got, wanted))
            if not torch.equal(got.isinf(), wanted.isinf()):
                worst[name] = torch.inf
            off = (got - wanted).nan_to_num(0, 0, 0).abs().max()
            worst[name] = max(worst[name], float(off / wanted.nan_to_num(0, 0, 0).abs().max().clamp(min=1)))

    compare(attention(query, key, value, extended=True, **keywords)[1])
    everything = attention_stats(query, key, extended=True, **keywords)
    compare(everything)
    period = sampling.effective_period(5, case.num_queries)
    taken = torch.zeros(query.shape[:3], dtype=torch.int64, device="cuda")
    for phase in range(period):
        rows = attention_stats(query, key, extended=True, sample=(period, phase), **keywords)
        index = sampling.row_index(*query.shape[:3], period, phase, query.device)
        assert torch.equal(rows.row_index, index)
        compare(rows, index)
        taken.scatter_add_(2, index.clamp(min=0), (index >= 0).long())
    assert (taken == 1).all(), "the phases do not take every row exactly once"
    return worst


def times(head_dim: int, heads: int, length: int, is_causal: bool, sweep: bool) -> dict:
    """Milliseconds by name; and of each tile shape, where asked for."""
    torch.manual_seed(0)
    shape = (TOKENS // length, heads, length, head_dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))

    def library(backend):
        def run():
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=is_causal)

        return run

    def sampled(extended=False):
        return attention_stats(q, k, is_causal=is_causal, extended=extended, sample=(PERIOD, 3))

    cudnn = library(SDPBackend.CUDNN_ATTENTION)
    peers = {
        "sdpa cudnn": cudnn,
        "sdpa flash": library(SDPBackend.FLASH_ATTENTION),
        "fused core": lambda: attention(q, k, v, is_causal=is_causal),
        "fused extended": lambda: attention(q, k, v, is_causal=is_causal, extended=True),
        "probe all": lambda: attention_stats(q, k, is_causal=is_causal),
        "probe all extended": lambda: attention_stats(q, k, is_causal=is_causal, extended=True),
        "probe 1/16": sampled,
        "probe 1/16 extended": lambda: sampled(True),
        "beside": lambda: (cudnn(), sampled()),
    }

    def time(run) -> float:
        with torch.no_grad():
            return do_bench_cudagraph(run, rep=50, return_mode="median")

    found = {name: time(run) for name, run in peers.items()}
    if sweep:
        options = Case(is_causal=is_causal).options(q, k, v, None, None)
        for tiles in TILES:
            for sample in (None, (PERIOD, 3)):
                label = f"probe {'all' if sample is None else '1/16'} {tuple(tiles)}"
                try:
                    found[label] = time(lambda t=tiles, s=sample: probe.probe(q, k, options, t, sample=s))
                except Exception as problem:  # a tile that does not fit is a result of the sweep
                    print(f"    {label}: {problem!r:.100}")
    return found


def check(rows: list) -> int:
    """Errors of every case into `rows`; how many are off."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for head_dim in (64, 128, 256, 80):
            for name, case in CHECKED.items():
                case = Case(**{**case.__dict__, "head_dim": head_dim, "value_dim": head_dim})
                rows.append([str(dtype), head_dim, name, errors(case, dtype)])
    worst = [max(row[3].values()) for row in rows]
    broken = sum(error > 5e-5 for error in worst)
    print(f"{len(rows)} cases, {broken} off by more than 5e-5; largest error {max(worst):.1e}")
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with fp64 first")
    parser.add_argument("--sweep", action="store_true", help="time the probe's tile shapes as well")
    parser.add_argument("--lengths", type=int, nargs="+", help="2048 8192 16384 unless given")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    document = {"machine": machine(), "period": PERIOD, "errors": [], "times": []}
    broken = check(document["errors"]) if arguments.check else 0
    for case in TIMED:
        if arguments.lengths and case[2] not in arguments.lengths:
            continue
        found = times(*case, arguments.sweep)
        document["times"].append([*case, found])
        head_dim, heads, length, is_causal = case
        print(f"D={head_dim} H={heads} N={length} {'causal' if is_causal else 'full'}", flush=True)
        for name, ms in sorted(found.items(), key=lambda item: item[0].count("(")):
            print(f"    {name:32s} {ms:7.3f} ms  {ms / found['sdpa cudnn']:.3f}x of SDPA-cuDNN", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    return int(broken > 0)


if __name__ == "__main__":
    raise SystemExit(main())
