"""Compare this checkout with an older one on a card: the same bits, and at what speed.

    python bench/regression.py OLD_TREE OUT.json [PART_OF_A_NAME ...]

Seeded cases run through the public `attention` and `attention_stats`. First all cases of both trees are computed, by
several processes, which also compile. Outputs, statistics and gradients are compared bit by bit (NaN equals NaN).
Then the trees are timed in turn, in CUDA graphs. A time is the median over the rounds of the median of a round. Cases
that are 2% apart after these rounds are timed in more of them, all of which count.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

BATCH, HEADS, LENGTH = 2, 16, 4096
ROUNDS, MORE_ROUNDS, RUNS, REPLAYS, WARM_UP = 3, 8, 12, 5, 3
ALLOWED = 0.02
SHARDS = 7  # processes of each tree that compile side by side
OPTIONS = {
    "causal": {"is_causal": True},
    "full": {},
    "window": {"is_causal": True, "window_size": 512},
    "soft-cap": {"is_causal": True, "softcap": 20.0},
    "sinks": {"is_causal": True, "sinks": True},
    "bool mask": {"mask": "bool"},
    "additive mask": {"mask": "additive"},
    "seqlens": {"is_causal": True, "seqlens": (0, 100, 1500, 1500, 4000)},
    "grouped": {"is_causal": True, "kv_heads": 4},
    "ragged": {"length": LENGTH - 3},
}


def cases():
    """(name, head_dim, dtype, action, keywords of `inputs` and of the call)."""
    for dtype in ("bfloat16", "float16", "float32"):
        for head_dim in (64, 128, 256):
            main = dtype == "bfloat16" and head_dim < 256
            for name, keywords in OPTIONS.items():
                if not main and name != "causal":
                    continue
                # Products in fp32 run on the plain units.
                keywords = keywords | ({"length": 1024} if dtype == "float32" else {})
                actions = ["forward", "statistics", "backward of out", "backward of rows"]
                if main and name in ("causal", "full", "bool mask", "seqlens"):
                    actions += ["extended", "sample"]
                for action in actions:
                    yield f"{action}, {name}, D={head_dim} {dtype}", head_dim, dtype, action, keywords


def inputs(
    torch, head_dim, dtype, mask=None, sinks=False, kv_heads=HEADS, length=LENGTH, seqlens=None, **call
):
    """(q, k, v, a cotangent, the call's keywords)."""
    generator = torch.Generator("cuda").manual_seed(0)
    kind = getattr(torch, dtype)

    def draw(*shape):
        return torch.randn(*shape, device="cuda", generator=generator).to(kind)

    batch = BATCH if seqlens is None else 1
    q, d_out = (draw(batch, HEADS, length, head_dim) for _ in range(2))
    k, v = (draw(batch, kv_heads, length, head_dim) for _ in range(2))
    if mask is not None:
        call["attn_mask"] = draw(batch, 1, length, length)
        if mask == "bool":
            call["attn_mask"] = call["attn_mask"] > -1
    if sinks:
        call["sinks"] = draw(HEADS).float()
    if seqlens is not None:
        call["seqlens"] = torch.tensor(seqlens, dtype=torch.int32, device="cuda")
    return q, k, v, d_out, call


def step_of(torch, action, q, k, v, d_out, call):
    """A function that computes the case's tensors, and again at each call."""
    from hnf_attention import attention, attention_stats

    def tensors(rows):
        values = (value for value in vars(rows).values() if isinstance(value, torch.Tensor))
        return [value.detach() for value in values]

    if action in ("statistics", "extended", "sample"):
        more = {"extended": action != "statistics"} | ({"sample": (4, 1)} if action == "sample" else {})
        return lambda: tensors(attention_stats(q, k, **call, **more))
    if action == "forward":

        def forward():
            out, rows = attention(q, k, v, **call)
            return [out, *tensors(rows)]

        return forward
    leaves = [x.requires_grad_() for x in (q, k, v)]
    leaves += [call[name].requires_grad_() for name in ("sinks",) if name in call]
    mask = call.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        leaves.append(mask.requires_grad_())
    ramp = torch.linspace(-1, 1, q.shape[:3].numel(), device="cuda").view(q.shape[:3])

    def backward():  # with its forward, because a CUDA graph captures both or none
        out, rows = attention(q, k, v, **call)
        results, cotangents = [out], [d_out]
        if action == "backward of rows":  # of an empty row, whose lse is -inf, the cotangent alone is used
            results = [rows.lse, rows.entropy]
            cotangents = [ramp, ramp]
        found = torch.autograd.grad(results, leaves, cotangents, allow_unused=True)
        return [torch.zeros(0, device="cuda") if x is None else x for x in found]

    return backward


def milliseconds(torch, step) -> float:
    """Of one step captured in a CUDA graph, so that the host has no part: median of RUNS turns of REPLAYS replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(RUNS)]
    for start, end in events:
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / REPLAYS


def measure(out: Path, shard: int | None, names: list[str]) -> None:
    """In the tree that PYTHONPATH names: the tensors of one shard's cases, or the milliseconds of the named cases."""
    import torch
    import triton

    import hnf_attention

    times, kept = {}, {}
    # PyTorch's own backward kernels add up in any order: bits are compared through ours.
    torch.use_deterministic_algorithms(shard is not None, warn_only=True)
    for number, (name, head_dim, dtype, action, keywords) in enumerate(cases()):
        if number % SHARDS != shard if shard is not None else name not in names:
            continue
        step = step_of(torch, action, *inputs(torch, head_dim, dtype, **keywords))
        if shard is not None:
            kept[name] = [x.cpu() for x in step()]
            continue
        times[name] = milliseconds(torch, step)
    versions = {"torch": str(torch.__version__), "triton": triton.__version__}
    package = str(Path(hnf_attention.__file__).resolve().parents[1])
    document = {"card": torch.cuda.get_device_name(), **versions, "tree": package, "ms": times}
    torch.save({"document": document, "tensors": kept}, out)


def start(path: Path, out: Path, shard: int | None, names: list[str]) -> subprocess.Popen:
    task = json.dumps([shard, names])
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", str(out), task]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(path)}, cwd=out.parent)


def equal(torch, old, new) -> bool:
    """Whether two lists of tensors have the same dtypes, shapes and numbers."""

    def same(a, b):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        if not a.is_floating_point():
            return torch.equal(a, b)
        return torch.equal(a.isnan(), b.isnan()) and torch.equal(
            a.masked_fill(a.isnan(), 0), b.masked_fill(b.isnan(), 0)
        )

    return len(old) == len(new) and all(map(same, old, new))


def ratio(times: dict, name: str) -> float:
    """New / old."""
    return statistics.median(times["new"][name]) / statistics.median(times["old"][name])


def main() -> None:
    import torch

    trees = {"old": Path(sys.argv[1]).resolve(), "new": Path(__file__).resolve().parents[1]}
    times, same, head = {"old": {}, "new": {}}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        files = {
            (tree, shard): Path(folder) / f"{tree}{shard}.pt" for tree in trees for shard in range(SHARDS)
        }
        running = [start(trees[tree], file, shard, []) for (tree, shard), file in files.items()]
        if any([process.wait() for process in running]):
            sys.exit("a case failed: see above")
        for shard in range(SHARDS):
            old, new = (torch.load(files[tree, shard], weights_only=True)["tensors"] for tree in trees)
            same |= {name: equal(torch, old[name], new[name]) for name in new}
        parts = sys.argv[3:] or [""]
        names = [name for name in same if any(part in name for part in parts)]
        for number in range(ROUNDS + MORE_ROUNDS):
            if number == ROUNDS:
                names = [name for name in names if abs(ratio(times, name) - 1) > ALLOWED]
            for tree, path in trees.items():
                file = Path(folder) / "times.pt"
                if start(path, file, None, names).wait():
                    sys.exit("a case failed: see above")
                head = torch.load(file, weights_only=True)["document"]
                if Path(head["tree"]) != path:
                    sys.exit(f"expected the package of {path}, got {head['tree']}")
                for name, ms in head["ms"].items():
                    times[tree].setdefault(name, []).append(ms)
    rows = {}
    for name in times["new"]:
        old, new = (statistics.median(times[tree][name]) for tree in trees)
        rounds = len(times["new"][name])
        rows[name] = {"equal": same[name], "old_ms": old, "new_ms": new, "ratio": new / old, "rounds": rounds}
    head = {key: head[key] for key in ("card", "torch", "triton")}
    Path(sys.argv[2]).write_text(json.dumps({**head, "cases": rows}, indent=1) + "\n")
    ratios = sorted(row["ratio"] for row in rows.values())
    for name, row in sorted(rows.items(), key=lambda item: item[1]["ratio"]):
        if not row["equal"] or row["rounds"] > ROUNDS:
            print(f"{row['old_ms']:9.3f} {row['new_ms']:9.3f} {row['ratio']:6.3f} {row['equal']!s:5} {name}")
    print(
        f"{sum(row['equal'] for row in rows.values())} of {len(rows)} cases have the same bits; new / old: "
        f"{ratios[0]:.3f} to {ratios[-1]:.3f}, median {statistics.median(ratios):.3f}"
    )


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        measure(Path(sys.argv[2]), *json.loads(sys.argv[3]))
    else:
        main()
