"""A user mask, as padding makes it of a causal model: our forward, training and probe beside SDPA's, on a GPU.

    python bench/user_masks.py OUT.json [HEAD_DIM ...]

Boolean masks (B, 1, N, N), causal, with the last quarter of every second sequence hidden; and the same as an
additive mask. Work is counted for all pairs, since a mask shows a kernel nothing it could skip: forward
4 * B * H * N * N * D floating-point operations, three and a half times as much with the backward. Medians of
CUDA events. The forward's tile shapes are timed as well; winners go into `kernels/configs.py` by hand.
"""

import json
import sys
from pathlib import Path
from statistics import median

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch
from machine import machine
from timing import spent
from torch.nn.functional import scaled_dot_product_attention

from hnf_attention import attention, attention_stats
from hnf_attention.engine.call import check
from hnf_attention.kernels.portable import forward
from hnf_attention.kernels.shared.tiles import Tiles

TOKENS, HEADS, ROUNDS, CALLS = (
    8192,
    {64: 32, 128: 16},
    9,
    5,
)  # calls queue up: the host hides behind the device
TILES = (Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 3), Tiles(64, 64, 4, 2), Tiles(128, 64, 8, 2))


def padded(batch: int, length: int, additive: bool) -> torch.Tensor:
    mask = torch.ones(batch, 1, length, length, dtype=torch.bool, device="cuda").tril_()
    mask[::2, :, :, 3 * length // 4 :] = False
    if not additive:
        return mask
    return torch.zeros(mask.shape, device="cuda", dtype=torch.bfloat16).masked_fill_(~mask, -torch.inf)


def times(head_dim: int, length: int, additive: bool) -> dict[str, float]:
    """Milliseconds by name, medians of calls that took turns."""
    torch.manual_seed(0)
    batch = TOKENS // length
    shape = (batch, HEADS[head_dim], length, head_dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
    cotangent, mask = torch.randn(shape, device="cuda", dtype=torch.bfloat16), padded(batch, length, additive)
    options = check(
        q, k, v, attn_mask=mask, is_causal=False, scale=None, window_size=None, softcap=None, sinks=None
    )

    def trained(run):
        return lambda: torch.autograd.grad(run(), (q, k, v), cotangent)

    def sdpa():
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def ours():
        return attention(q, k, v, attn_mask=mask)[0]

    actions = {
        "sdpa": sdpa,
        "ours": ours,
        "probe": lambda: attention_stats(q, k, attn_mask=mask),
        "sdpa, trained": trained(sdpa),
        "ours, trained": trained(ours),
    }
    with torch.no_grad():
        detached = [x.detach() for x in (q, k, v)]
    for tiles in TILES:
        actions[f"forward {tuple(tiles)}"] = lambda tiles=tiles: forward.forward(*detached, options, tiles)
    found = {name: [] for name in actions}
    for number in range(ROUNDS + 1):
        for name, action in actions.items():
            seconds = spent(lambda action=action: [action() for _ in range(CALLS)]).device / CALLS
            if number:  # the first one compiles
                found[name].append(seconds * 1e3)
    return {name: median(values) for name, values in found.items()}


def main() -> None:
    document = {"machine": machine(), "seed": 0, "times": []}
    for head_dim in [int(argument) for argument in sys.argv[2:]] or HEADS:
        for length in (1024, 4096):
            for additive in (False, True):
                found = times(head_dim, length, additive)
                document["times"].append([head_dim, length, "additive" if additive else "bool", found])
                print(f"D={head_dim} N={length} {'additive' if additive else 'bool'}", flush=True)
                for name, ms in found.items():
                    base = found["sdpa, trained" if "trained" in name else "sdpa"]
                    print(f"    {name:24} {ms:8.3f} ms  {ms / base:6.2f}x", flush=True)
                Path(sys.argv[1]).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
