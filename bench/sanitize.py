"""One call of every kernel on a few awkward shapes, to run under compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 python bench/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python bench/sanitize.py [PART ...]

PART is a head dimension, hopper, masks, packed or control.

Without PyTorch's cache every tensor is an allocation of its own, so that an access just outside of one is
seen. Lengths are no multiples of a tile, heads are grouped, and strides are not those of a fresh tensor.
"""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from hnf_attention import attention, attention_stats
from hnf_attention.engine import engines, fold
from hnf_attention.engine.call import Call, check

HEAD_DIMS = (64, 80, 128)
HEADS, KV_HEADS, QUERIES, KEYS = 4, 2, 300, 300
VARIANTS: dict[str, dict] = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "window_size": 70},
    "soft-cap": {"softcap": 20.0},
}


def inputs(head_dim: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """query, key and value as a model makes them: (B, M, H, D) in memory, seen as (B, H, M, D)."""
    torch.manual_seed(0)
    sizes = ((QUERIES, HEADS), (KEYS, KV_HEADS), (KEYS, KV_HEADS))
    return [
        torch.randn(2, rows, heads, head_dim, device="cuda", dtype=dtype).transpose(1, 2).requires_grad_()
        for rows, heads in sizes
    ]


def options_of(*tensors: Tensor, **keywords):
    names = ("attn_mask", "scale", "window_size", "softcap", "sinks", "seqlens")
    return check(*tensors, **(dict.fromkeys(names) | {"is_causal": False} | keywords))


def forward(query: Tensor, key: Tensor, value: Tensor, **keywords) -> None:
    attention(query, key, value, **keywords)


def extended(query: Tensor, key: Tensor, value: Tensor, **keywords) -> None:
    attention(query, key, value, extended=True, **keywords)


def probe(query: Tensor, key: Tensor, value: Tensor, **keywords) -> None:
    attention_stats(query, key, extended=True, **keywords)
    attention_stats(query, key, sample=(4, 1), **keywords)


def training(query: Tensor, key: Tensor, value: Tensor, **keywords) -> None:
    """Our own backward: a gradient of entropy forbids the library's."""
    out, rows = attention(query, key, value, **keywords)
    (out.float().sum() + rows.entropy.sum()).backward()


def folded(query: Tensor, key: Tensor, value: Tensor, **keywords) -> None:
    rows = attention_stats(query, key, **keywords)
    accumulator = fold.new_accumulator(HEADS, query.device)
    fold.fold(accumulator, query.detach(), key.detach(), rows, options_of(query, key, value, **keywords))


ACTIONS: tuple[Callable, ...] = (forward, extended, probe, training, folded)


def path_of(head_dim: int) -> str:
    query, key, value = inputs(head_dim)
    call = Call(query, key, value, options_of(query, key, value))
    return engines.choose(engines.FORWARD, call).name


def done(action: Callable, *tensors: Tensor, **keywords) -> None:
    started = perf_counter()
    action(*tensors, **keywords)
    torch.cuda.synchronize()
    print(f"  {action.__name__} {perf_counter() - started:.1f} s", flush=True)


def plain(head_dim: int) -> None:
    for name, keywords in VARIANTS.items():
        print(f"D={head_dim}, {name}: {path_of(head_dim)}", flush=True)
        for action in ACTIONS:
            done(action, *inputs(head_dim), **keywords)


def hopper() -> None:
    """The forward alone, by every path of the Hopper one."""
    edges = torch.tensor([0, 37, 37, 200, QUERIES - 9], dtype=torch.int32, device="cuda")
    keys = torch.arange(KEYS, device="cuda")
    padding = torch.stack([keys >= 70, keys < 200])[:, None, None]
    calls: dict[str, dict] = {
        "full": {},
        "causal": {"is_causal": True},
        "sinks": {"is_causal": True, "sinks": torch.zeros(HEADS, device="cuda")},
        "window": {"window_size": 70},
        "window of whole tiles": {"is_causal": True, "window_size": 128},
        "pack": {"is_causal": True, "seqlens": edges},
        "pack with a window": {"is_causal": True, "seqlens": edges, "window_size": 70},
        "padding": {"is_causal": True, "attn_mask": padding},
    }
    for head_dim, (name, keywords) in itertools.product((64, 128, 256), calls.items()):
        tensors = [x.detach()[: 1 if "seqlens" in keywords else 2] for x in inputs(head_dim)]
        call = Call(*tensors, options_of(*tensors, **keywords))
        print(f"D={head_dim}, {name}: {engines.choose(engines.FORWARD, call).name}", flush=True)
        done(forward, *tensors, **keywords)


def masks() -> None:
    for mask in (
        torch.rand(QUERIES, KEYS, device="cuda") > 0.3,
        torch.randn(2, HEADS, QUERIES, KEYS, device="cuda").requires_grad_(),
    ):
        print(f"mask of {mask.dtype}", flush=True)
        for action in ACTIONS:
            done(action, *inputs(64), attn_mask=mask)


def packed() -> None:
    print("packed", flush=True)
    lengths = torch.tensor([0, 37, 37, 200, QUERIES], dtype=torch.int32, device="cuda")
    for action in (forward, extended, probe, training):
        done(action, *(x.detach()[:1].requires_grad_() for x in inputs(64)), is_causal=True, seqlens=lengths)


def main() -> int:
    if not torch.cuda.is_available():
        print("expected a CUDA card")
        return 2
    for part in sys.argv[1:] or (*HEAD_DIMS, "hopper", "masks", "packed"):
        if part == "hopper":
            hopper()
        elif part == "masks":
            masks()
        elif part == "packed":
            packed()
        elif part == "control":
            from sanitize_control import control

            done(control)
        else:
            plain(int(part))
    print("done")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
