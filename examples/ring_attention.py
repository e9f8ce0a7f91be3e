"""Ring attention that is trained and monitored: the sequence is split over processes, keys and values go round.

    torchrun --nproc-per-node 4 examples/ring_attention.py
    torchrun --nproc-per-node 2 examples/ring_attention.py --order contiguous --length 4096

Each process keeps its queries and attends to one block of keys after the other. `merge_attention` puts the outputs
together, and `observe_blocks` tells the monitor of each block. In the backward keys, values and their gradients go
round once more. Afterwards every process trains on the whole sequence by itself and compares.
Runs on GPUs over NCCL if there are enough, else on CPUs over gloo.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hnf_attention import (
    AttentionStabilityMonitor,
    ProcessGroups,
    attention,
    merge_attention,
    observe_blocks,
)

WIDTH, HEADS, KEY_HEADS, HEAD_DIM = 256, 4, 2, 64  # two query heads to a key head
# Each process looks for sinks among its own queries, so `sink_mass` is not compared.
STATISTICS = ("entropy", "max_weight", "logit_range_max", "max_logit", "min_logit", "log2_curvature")


def pieces(rank: int, size: int, order: str) -> list[int]:
    """Which pieces of the sequence a process holds.

    contiguous: one of `size`; the last process has the most visible keys, and the others wait for it.
    zigzag: two of 2 x size, one from the beginning and one from the end, so that all have the same work.
    """
    return [rank] if order == "contiguous" else [rank, 2 * size - 1 - rank]


def share(x: Tensor, rank: int, size: int, order: str, dim: int = 1) -> Tensor:
    """The rows of x that a process holds along `dim`, its pieces one after the other."""
    held = pieces(rank, size, order)
    return torch.cat([x.chunk(size * len(held), dim)[piece] for piece in held], dim)


def pairs(
    step: int, rank: int, size: int, order: str, length: int
) -> Iterator[tuple[slice, slice, int, bool]]:
    """What this process computes at a step of the ring.

    Yields (its queries, the keys in the passing block, the position of the first of these, whether they are of the same
    piece) for each pair of pieces that see each other. Later keys are hidden from all queries, earlier ones from none.
    """
    mine, theirs = pieces(rank, size, order), pieces((rank - step) % size, size, order)
    width = length // len(mine)
    for number, piece in enumerate(mine):
        for other_number, other in enumerate(theirs):
            if other <= piece:
                queries = slice(number * width, (number + 1) * width)
                keys = slice(other_number * width, (other_number + 1) * width)
                yield queries, keys, other * width, other == piece


class Ring(torch.autograd.Function):
    """Causal attention of this process's queries to the keys of all, by blocks."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup, order: str
    ) -> Tensor:
        rank, size, length = dist.get_rank(group), dist.get_world_size(group), query.shape[2]
        done: dict[int, Any] = {}  # what was merged so far, by the first query of a piece
        block = torch.stack([key, value])
        with observe_blocks(query) as call:
            for step in range(size):
                last = step == size - 1
                following, transfer = (
                    (block, []) if last else pass_on(block, group)
                )  # while this one is computed
                for queries, keys, start, own in pairs(step, rank, size, order, length):
                    k, v = block[:, :, :, keys]
                    out, rows = attention(query[:, :, queries], k, v, is_causal=own, extended=True)
                    call.add(k, v, start=start, queries=queries, is_causal=own, rows=rows)
                    part = out.float(), rows  # so that no merge rounds to half precision
                    before = done.get(queries.start)
                    done[queries.start] = part if before is None else merge_attention([before, part])
                for request in transfer:
                    request.wait()
                block = following
            parts = [done[first] for first in sorted(done)]
            call.output = output = torch.cat([out for out, _ in parts], 2).to(query.dtype)
        lse = torch.cat([rows.lse for _, rows in parts], 2)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.group, ctx.order = group, order
        return output

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        """Each block is computed again. With its share P = exp(lse of the block - lse) of a row's softmax,
        d out_block = P d_out and d lse_block = P d_out . (out_block - out).
        """
        query, key, value, output, lse = ctx.saved_tensors
        group, order = ctx.group, ctx.order
        rank, size, length = dist.get_rank(group), dist.get_world_size(group), query.shape[2]
        d_query = torch.zeros_like(query, dtype=torch.float32)
        block = torch.stack([key, value])
        gradient = torch.zeros_like(block, dtype=torch.float32)
        for step in range(size):
            following, transfer = (block, []) if step == size - 1 else pass_on(block, group)
            for queries, keys, _, own in pairs(step, rank, size, order, length):
                inputs = [x.detach().requires_grad_() for x in (query[:, :, queries], *block[:, :, :, keys])]
                with torch.enable_grad():
                    out, rows = attention(*inputs, is_causal=own)
                shared = (rows.lse.detach() - lse[:, :, queries]).exp()
                d_part = d_out[:, :, queries].float()
                d_lse = shared * (d_part * (out.detach().float() - output[:, :, queries].float())).sum(-1)
                grads = torch.autograd.grad(
                    (out, rows.lse), inputs, ((shared[..., None] * d_part).to(out), d_lse)
                )
                d_query[:, :, queries] += grads[0]
                gradient[:, :, :, keys] += torch.stack(grads[1:])
            for request in transfer:
                request.wait()
            block = following
            gradient, transfer = pass_on(gradient, group)  # with its keys; after the last step it is at home
            for request in transfer:
                request.wait()
        d_key, d_value = gradient.to(key.dtype)
        return d_query.to(query.dtype), d_key, d_value, None, None


def pass_on(block: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, list[dist.Work]]:
    """Start sending a block to the next process and receiving the previous one's. Returns that and the requests."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if size == 1:
        return block, []
    following = torch.empty_like(block)
    send = dist.P2POp(dist.isend, block, group=group, group_peer=(rank + 1) % size)
    receive = dist.P2POp(dist.irecv, following, group=group, group_peer=(rank - 1) % size)
    return following, dist.batch_isend_irecv([send, receive])


def ring_attention(
    query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup, order: str = "zigzag"
) -> Tensor:
    """Causal attention of this process's queries to the keys of all: (B, H, n, D), differentiable.

    query, key, value: (B, H, n, D), (B, H_kv, n, D), the process's share; n the same in every process.
    """
    return Ring.apply(query, key, value, group, order)


class Attention(nn.Module):
    """group: processes that hold parts of the sequence; None for the whole sequence in this one."""

    def __init__(self, group: dist.ProcessGroup | None, order: str):
        super().__init__()
        self.group, self.order = group, order
        self.q, self.out = nn.Linear(WIDTH, HEADS * HEAD_DIM), nn.Linear(HEADS * HEAD_DIM, WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * KEY_HEADS * HEAD_DIM)

    def forward(self, x: Tensor) -> Tensor:
        projected = torch.cat([self.q(x), self.kv(x)], -1).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        q, k, v = projected.split([HEADS, KEY_HEADS, KEY_HEADS], 1)
        if self.group is None:
            out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            out = ring_attention(q, k, v, self.group, self.order)
        return x + self.out(out.transpose(1, 2).flatten(2))


def train(x: Tensor, group: dist.ProcessGroup | None, order: str, steps: int = 3) -> tuple[list[float], Any]:
    """Losses of some steps on the tokens that this process holds, and the head statistics of each layer at the last."""
    torch.manual_seed(0)
    model = nn.Sequential(Attention(group, order), Attention(group, order)).to(x.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ranks = None if group is None else ProcessGroups(queries=group)
    losses = []
    with AttentionStabilityMonitor(model, log_every=steps, ranks=ranks) as monitor:
        for _ in range(steps):
            loss = model(x).square().mean()
            loss.backward()
            size = 1 if group is None else dist.get_world_size(group)
            for parameter in model.parameters() if group is not None else ():
                dist.all_reduce(parameter.grad, group=group)
                parameter.grad /= size
            if group is not None:
                loss = loss.detach()
                dist.all_reduce(loss, group=group)
                loss /= size
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
            monitor.on_step()
    return losses, monitor.history[-1].layers


def main(arguments: argparse.Namespace) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpus else "gloo")
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(2, arguments.length, WIDTH, generator=generator).to(device)
    losses, layers = train(share(whole, rank, size, arguments.order), dist.group.WORLD, arguments.order)
    expected_losses, expected = train(whole, None, arguments.order)
    largest = {"loss": max(abs(a - b) for a, b in zip(losses, expected_losses))}
    for name in STATISTICS:
        largest[name] = max(
            abs(getattr(layers[layer], name) - getattr(expected[layer], name)).max() for layer in expected
        )
    if rank == 0:
        print(f"{size} processes on {device.type}, {arguments.order}, {arguments.length} tokens")
        print("losses:", ", ".join(f"{loss:.6f}" for loss in losses))
        means = ", ".join(f"{mean:.4f}" for mean in layers["0"].entropy)
        print("mean entropy of each head of the first layer:", means, "nats")
        for name, error in largest.items():
            print(f"largest difference of {name} from one process: {error:.1e}")
    dist.destroy_process_group()
    if not all(error < 1e-4 for error in largest.values()):  # fp32 rounding
        raise SystemExit(f"expected the ring to agree with one process to 1e-4, got {largest}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--order", choices=("zigzag", "contiguous"), default="zigzag")
    parser.add_argument("--length", type=int, default=1024, help="tokens; a multiple of twice the processes")
    main(parser.parse_args())
