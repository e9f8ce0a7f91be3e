"""Ring attention with exact statistics: the sequence is split over processes, keys and values go round.

    torchrun --nproc-per-node 4 examples/ring_attention.py
    torchrun --nproc-per-node 2 examples/ring_attention.py --order contiguous --length 4096

Each process keeps its queries and attends to one block of keys after the other. `merge_attention` puts output and
statistics together. Causal, forward only. Every process then computes the whole sequence by itself and compares.
Runs on GPUs over NCCL if there are enough, else on CPUs over gloo.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor

from hnf_attention import attention, merge_attention

STATISTICS = ("lse", "entropy", "max_weight", "max_logit", "min_logit")


def pieces(rank: int, size: int, order: str) -> list[int]:
    """Which pieces of the sequence a process holds.

    contiguous: one of `size`; the last process has the most visible keys, and the others wait for it.
    zigzag: two of 2 x size, one from the beginning and one from the end, so that all have the same work.
    """
    return [rank] if order == "contiguous" else [rank, 2 * size - 1 - rank]


def share(x: Tensor, rank: int, size: int, order: str) -> Tensor:
    """(B, H, N, D) or (B, H, N) -> the rows of it that a process holds, its pieces one after the other."""
    held = pieces(rank, size, order)
    return torch.cat([x.chunk(size * len(held), 2)[piece] for piece in held], 2)


@torch.no_grad()
def ring_attention(
    query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup, order: str = "zigzag"
) -> tuple[Tensor, dict[str, Tensor]]:
    """Causal attention of this process's queries to the keys of all.

    query, key, value: (B, H, n, D), (B, H_kv, n, D), as `share` gives them; n the same in every process.
    Returns the output (B, H, n, D), fp32, and STATISTICS of its rows, (B, H, n) each.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    mine = pieces(rank, size, order)
    queries = query.chunk(len(mine), 2)
    done: list = [[] for _ in mine]  # for each piece of queries, what was merged so far: at most one part
    block = torch.stack([key, value])
    for step in range(size):
        last = step == size - 1
        following, transfer = (block, []) if last else _pass_on(block, group)  # while this one is computed
        theirs = pieces((rank - step) % size, size, order)
        keys, values = (x.chunk(len(theirs), 2) for x in block)
        for number, piece in enumerate(mine):
            for other, k, v in zip(theirs, keys, values):
                if other <= piece:  # later keys are hidden from all of its queries, earlier ones from none
                    out, rows = attention(queries[number], k, v, is_causal=other == piece)
                    done[number].append((out.float(), rows))  # so that no merge rounds to half precision
            if len(done[number]) > 1:
                done[number] = [merge_attention(done[number])]
        for request in transfer:
            request.wait()
        block = following
    parts = [part for (part,) in done]
    statistics = {name: torch.cat([getattr(rows, name) for _, rows in parts], 2) for name in STATISTICS}
    return torch.cat([out for out, _ in parts], 2), statistics


def _pass_on(block: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, list[dist.Work]]:
    """Start sending a block to the next process and receiving the previous one's. Returns that and the requests."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    following = torch.empty_like(block)
    send = dist.P2POp(dist.isend, block, group=group, group_peer=(rank + 1) % size)
    receive = dist.P2POp(dist.irecv, following, group=group, group_peer=(rank - 1) % size)
    return following, dist.batch_isend_irecv([send, receive])


def main(arguments: argparse.Namespace) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpus else "gloo")
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, arguments.length, 64) for heads in (4, 2, 2)]  # two query heads to a key head
    whole = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    out, statistics = ring_attention(
        *(share(x, rank, size, arguments.order) for x in whole), dist.group.WORLD, arguments.order
    )

    expected, rows = attention(*whole, is_causal=True)
    found = {"output": out, **statistics}
    wanted = {"output": expected, **{name: getattr(rows, name) for name in STATISTICS}}
    errors = [(x - share(wanted[name], rank, size, arguments.order)).abs().max() for name, x in found.items()]
    largest = torch.stack(errors)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    entropy = statistics["entropy"].sum((0, 2))  # (H,), over the rows of this process
    dist.all_reduce(entropy)
    if rank == 0:
        print(f"{size} processes on {device.type}, {arguments.order}, {arguments.length} tokens")
        means = (entropy / (2 * arguments.length)).tolist()
        print("mean entropy of each head:", ", ".join(f"{mean:.4f}" for mean in means), "nats")
        for name, error in zip(found, largest.tolist()):
            print(f"largest difference of {name} from one process: {error:.1e}")
    dist.destroy_process_group()
    if not (largest < 1e-4).all():  # fp32 rounding
        raise SystemExit(f"expected the ring to agree with one process to 1e-4, got {largest.tolist()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--order", choices=("zigzag", "contiguous"), default="zigzag")
    parser.add_argument("--length", type=int, default=1024, help="tokens; a multiple of twice the processes")
    main(parser.parse_args())
