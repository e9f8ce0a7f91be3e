"""The Hopper forward under windows, packs, sinks and padding masks beside its peers, in one run and in shuffled order.

    python bench/hopper_intervals.py compile                                 compiles every kernel, many at once
    python bench/hopper_intervals.py windows packs sinks wide padding accuracy --out bench/results/NAME.json

bf16, B * N = 16k tokens (32k at N = 32k), model width 2048. Each number is the median of 21 launches, in ms; the host
queues a launch while the device sleeps. "portable" is this project's forward for all cards. Ratios are ours over peer.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import random
import statistics
import sys
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch
from machine import machine
from suite import HEADS, TOKENS
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from hnf_attention.engine.call import check
from hnf_attention.kernels.hopper import host
from hnf_attention.kernels.portable import forward as portable

ROUNDS, SLEEP = 21, 2_000_000  # cycles that the device sleeps: 1 ms
LARGEST_ERROR = 6e-3  # of the output, relative to a peer's: both round to bf16
WRONG: list[str] = []  # peers whose output differed
RAGGED = (0, 300, 2700, 2764, 6900, 8000, 9500, 9628, 13100, 15900, TOKENS)
EVEN = tuple(range(0, TOKENS + 1, 2048))


def drawn(batch, heads, length, head_dim, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (batch, heads, length, head_dim)
    return [torch.randn(shape, device="cuda", dtype=dtype, generator=generator) for _ in "qkv"]


def options_of(q, k, v, **given):
    """The options of a call, causal unless told otherwise."""
    names = ("attn_mask", "scale", "window_size", "softcap", "sinks", "seqlens")
    return check(q, k, v, **dict.fromkeys(names) | {"is_causal": True} | given)


def ours(q, k, v, function=host.forward, **given):
    """A call of our forward, and its output."""
    options = options_of(q, k, v, **given)
    return lambda: function(q, k, v, options)[0]


def flex(q, k, v, visible):
    """FlexAttention, compiled for this call alone; visible(b, h, i, j)."""
    torch.compiler.reset()
    mask = create_block_mask(visible, None, None, q.shape[2], k.shape[2], device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return lambda: compiled(q, k, v, block_mask=mask)


def error(got, wanted):
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def times(calls: dict, same: tuple[str, ...] = ()) -> dict[str, float]:
    """Median ms of each call. The outputs of those in `same` must agree with the first call's; it says so if not.

    A peer that does not compute a call is left out.
    """
    first, *others = calls
    wanted = calls[first]()
    for name in others:
        try:
            off = error(calls[name](), wanted) if name in same else 0.0
        except Exception as problem:
            print(f"{name} does not compute this: {str(problem).strip().splitlines()[-1][:100]}")
            del calls[name]
            continue
        if not off < LARGEST_ERROR:
            print(f"WRONG: the output of {name} and {first} differ by {off:.1e}")
            WRONG.append(name)
    del wanted
    events = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name in random.sample(list(calls), len(calls)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
            torch.cuda._sleep(SLEEP)
            start.record()
            calls[name]()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) for name, pairs in events.items()}


def windows():
    for head_dim, length, window in (
        (d, n, w) for d in (64, 128, 256) for n in (8192, 32768) for w in (1024, 4096)
    ):
        q, k, v = drawn(max(1, TOKENS // length), HEADS[head_dim], length, head_dim)

        def visible(b, h, i, j, window=window):
            return (j <= i) & (i - j < window)

        calls = {
            "ours": ours(q, k, v, window_size=window),
            "flex": flex(q, k, v, visible),
            "portable": ours(q, k, v, portable.forward, window_size=window),
            "ours, no window": ours(q, k, v),
        }
        yield f"window {window}, D={head_dim} N={length}", times(calls, ("flex", "portable")), {"flex": 0.8}


def packs():
    for head_dim, (name, edges) in (
        (d, x) for d in (64, 128) for x in (("8 x 2k", EVEN), ("ragged", RAGGED))
    ):
        heads = HEADS[head_dim]
        q, k, v = drawn(1, heads, TOKENS, head_dim)
        seqlens = torch.tensor(edges, dtype=torch.int32, device="cuda")
        sequence = torch.searchsorted(seqlens[1:], torch.arange(TOKENS, device="cuda"), right=True)

        def visible(b, h, i, j, sequence=sequence):
            return (j <= i) & (sequence[i] == sequence[j])

        even = drawn(8, heads, 2048, head_dim)
        calls = {
            "ours": ours(q, k, v, seqlens=seqlens),
            "flex": flex(q, k, v, visible),
            "portable": ours(q, k, v, portable.forward, seqlens=seqlens),
            "unpacked 8 x 2k": ours(*even),
        }
        found = times(calls, ("flex", "portable"))
        # Per pair of tiles of 128: the same work as of 8 x 2k, if a sequence began at a tile.
        tiles = sum(n * (n + 1) / 2 for n in (-(-(b - a) // 128) for a, b in zip(edges, edges[1:])))
        found["unpacked, by work"] = found["unpacked 8 x 2k"] * tiles / (8 * 16 * 17 / 2)
        yield f"pack of {name}, D={head_dim}", found, {"unpacked, by work": 1.05, "flex": 0.8}


def sinks():
    for head_dim, length in ((d, n) for d in (64, 128) for n in (2048, 8192)):
        q, k, v = drawn(TOKENS // length, HEADS[head_dim], length, head_dim)
        learned = torch.zeros(HEADS[head_dim], device="cuda")
        calls = {
            "ours": ours(q, k, v, sinks=learned),
            "without sinks": ours(q, k, v),
            "portable": ours(q, k, v, portable.forward, sinks=learned),
        }
        yield f"sinks, D={head_dim} N={length} causal", times(calls, ("portable",)), {"without sinks": 1.03}


def wide():
    """Latent attention (D = 192, D_v = 128) and D = 256, causal; SDPA by its default backend."""
    for (head_dim, value_dim), length in (
        (d, n) for d in ((192, 128), (256, 256)) for n in (4096, 8192, 16384)
    ):
        heads = HEADS[256] if head_dim == 256 else HEADS[128]
        q, k, v = drawn(TOKENS // length, heads, length, head_dim)
        v = v[..., :value_dim].contiguous()
        calls = {
            "ours": ours(q, k, v),
            "sdpa": functools.partial(scaled_dot_product_attention, q, k, v, is_causal=True),
            "portable": ours(q, k, v, portable.forward),
        }
        found = times(calls, ("sdpa", "portable"))
        yield f"D={head_dim} D_v={value_dim} N={length} causal", found, {"sdpa": 1.1}


def padding_masks(batch, length):
    """25% of each sequence is padding."""
    positions = torch.arange(length, device="cuda")
    causal = positions <= positions[:, None]
    right = (positions < 3 * length // 4).expand(batch, 1, 1, length)
    left = (positions >= length // 4).expand(batch, 1, 1, length)
    yield "keys, right", right.contiguous()
    yield "rows and keys, causal, right", (right & causal).contiguous()
    # SDPA gives NaN, and we give 0, for a row without a key: transformers show such a row every key.
    yield "rows and keys, causal, left", ((left & causal) | ~left.transpose(2, 3)).contiguous()
    holes = torch.rand(batch, 1, length, length, device="cuda") > 0.1
    yield (
        "no interval: 10% of the keys at random",
        holes & causal | torch.eye(length, device="cuda", dtype=torch.bool),
    )


def padding():
    length = 4096
    for head_dim in (64, 128):
        q, k, v = drawn(TOKENS // length, HEADS[head_dim], length, head_dim)
        for name, mask in padding_masks(TOKENS // length, length):
            wanted = {"portable": 1.1} if "no interval" in name else {"sdpa": 1.0}
            calls = {
                "ours": ours(q, k, v, attn_mask=mask, is_causal=False),
                "sdpa": functools.partial(scaled_dot_product_attention, q, k, v, attn_mask=mask),
                "portable": ours(q, k, v, portable.forward, attn_mask=mask, is_causal=False),
            }
            yield (
                f"padding: {name}, D={head_dim} N={length}",
                times(calls, ("sdpa", "portable")),
                wanted,
            )


def with_sinks(q, k, v, learned, visible):
    """What transformers computes eagerly, in the dtype of q."""
    scores = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).masked_fill(~visible, -torch.inf)
    column = learned.to(q.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], 3).softmax(-1)[..., :-1] @ v


def accuracy():
    """Errors against fp64 beside those of SDPA with the same mask (with sinks: of eager attention)."""
    length = 2048
    i, j = torch.arange(length, device="cuda")[:, None], torch.arange(length, device="cuda")
    edges = torch.tensor((0, 300, 1000, 1001, length), dtype=torch.int32, device="cuda")
    sequence = torch.searchsorted(edges[1:], j, right=True)
    causal = j <= i
    padded = (causal & (j < 1500))[None, None]
    learned = torch.linspace(-2, 4, 4, device="cuda")
    kinds = {
        "window": (causal & (i - j < 300), {"window_size": 300}),
        "pack": (causal & (sequence[:, None] == sequence), {"seqlens": edges}),
        "padding": (padded, {"attn_mask": padded, "is_causal": False}),
        "sinks": (causal, {"sinks": learned}),
    }
    for dtype, head_dim in ((t, d) for t in (torch.float16, torch.bfloat16) for d in (64, 128, 256)):
        q, k, v = drawn(1, 4, length, head_dim, dtype)
        exact = [x.double() for x in (q, k, v)]
        for name, (visible, given) in kinds.items():
            if name == "sinks":
                wanted = with_sinks(*exact, learned, visible)
                peer = with_sinks(q, k, v, learned, visible)
            else:
                wanted = scaled_dot_product_attention(*exact, attn_mask=visible)
                peer = scaled_dot_product_attention(q, k, v, attn_mask=visible)
            found = {"ours": error(ours(q, k, v, **given)(), wanted), "pytorch": error(peer, wanted)}
            kind = str(dtype).removeprefix("torch.")
            yield f"error, {name}, D={head_dim} {kind}", found, {"pytorch": 2.0}


WIDTHS = [(256, torch.bfloat16)] + [(d, t) for t in (torch.bfloat16, torch.float16) for d in (128, 64)]
VARIANTS = {
    "causal": {},
    "full": {"is_causal": False},
    "window": {"window_size": 100},
    "window, both sides": {"window_size": 100, "is_causal": False},
    "pack": {"seqlens": (0, 100, 300)},
    "pack, full": {"seqlens": (0, 100, 300), "is_causal": False},
    "pack, window": {"seqlens": (0, 100, 300), "window_size": 100},
    "pack, window, both sides": {"seqlens": (0, 100, 300), "window_size": 100, "is_causal": False},
    "pack, window, sinks": {"seqlens": (0, 100, 300), "window_size": 100, "sinks": 2},
    "mask": {"attn_mask": (2, 1, 1, 384), "is_causal": False},
    "mask, causal": {"attn_mask": (2, 1, 384, 384)},
    "mask, sinks": {"attn_mask": (2, 1, 384, 384), "sinks": 2, "is_causal": False},
    "mask, causal, sinks": {"attn_mask": (2, 1, 384, 384), "sinks": 2},
    "sinks": {"sinks": 2},
    "sinks, full": {"sinks": 2, "is_causal": False},
    "sinks, window, both sides": {"sinks": 2, "window_size": 100, "is_causal": False},
}


def build(job):
    """Compile one variant into the cache on disk, in a process of its own; returns what went wrong."""
    name, head_dim, dtype = job
    given = dict(VARIANTS[name])
    try:
        batch = 1 if "seqlens" in given else 2
        q, k, v = drawn(batch, 2, 384, head_dim, dtype)
        if "seqlens" in given:
            given["seqlens"] = torch.tensor(given["seqlens"], dtype=torch.int32, device="cuda")
        if "attn_mask" in given:
            given["attn_mask"] = torch.ones(given["attn_mask"], dtype=torch.bool, device="cuda")
        if "sinks" in given:
            given["sinks"] = torch.zeros(given["sinks"], device="cuda")
        wanted = ours(q, k, v, portable.forward, **given)()
        off = error(ours(q, k, v, **given)(), wanted)
        torch.cuda.synchronize()
        return None if off < LARGEST_ERROR else f"off by {off:.1e}"
    except Exception:  # what does not build is reported, and the others are built
        return traceback.format_exc()[-400:]


def compile_all() -> None:
    jobs = [(name, d, t) for d, t in WIDTHS for name in VARIANTS]
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        wrong = {job: text for job, text in zip(jobs, pool.map(build, jobs, chunksize=1)) if text}
    for job, text in wrong.items():
        print(*job, text, sep="\n  ")
    print(f"{len(jobs) - len(wrong)} of {len(jobs)} variants compile and agree with the portable forward")


GROUPS = {
    "windows": windows,
    "packs": packs,
    "sinks": sinks,
    "wide": wide,
    "padding": padding,
    "accuracy": accuracy,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("groups", nargs="+", choices=["compile", *GROUPS])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    random.seed(0)
    rows = []
    for group in given.groups:
        if group == "compile":
            compile_all()
            continue
        for case, found, targets in GROUPS[group]():
            ratios = {peer: found["ours"] / number for peer, number in found.items() if peer != "ours"}
            rows.append({"case": case, "found": found, "ratios": ratios, "targets": targets})
            shown = (
                f"{peer} {ratio:.2f}" + (f" (wanted {targets[peer]:g})" if peer in targets else "")
                for peer, ratio in ratios.items()
            )
            print(f"{case:44} ours {found['ours']:.3g}, of", ", ".join(shown), flush=True)
            if given.out is not None:
                given.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    missed = [
        row
        for row in rows
        for peer, wanted in row["targets"].items()
        if row["ratios"].get(peer, 0.0) > wanted
    ]
    print(f"{len(rows)} cases, {len(missed)} targets missed, {len(WRONG)} outputs that differ")


if __name__ == "__main__":
    main()
