"""The gains of QK-norm: what they start at, and how processes keep them alike."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import peers
from .shards import HeadPart, Spread, own_part


class Gains:
    """Makes the gains of layers, query (H,) and key (H_kv,), fp32, between `least` and `most`.

    Every process of torch.distributed has to make those of the same layers, in the same order.
    """

    def __init__(self, least: float, most: float):
        self._least, self._most = least, most
        self._groups: dict[HeadPart, Any] = {}

    @torch.no_grad()
    def measured(self, part: HeadPart, query: Tensor, key: Tensor) -> list[Tensor] | str:
        """Each head's mean root mean square of queries and keys (B, H, M, D), over all processes that hold the head.

        A text says why there can be none. part: of the heads, those that this process holds.
        """
        mine = [_mean_rms(query), _mean_rms(_once(key))]
        everyone = peers.gathered((part, [x.tolist() for x in mine]))
        if len({tuple(map(len, values)) for _, values in everyone}) > 1:
            return "processes have different numbers of its heads"
        means = {}
        for one, _ in everyone:
            same = [values for other, values in everyone if other == one]
            means[one] = [torch.tensor(x).mean(0) for x in zip(*same)]
        keys = [set(key_means.tolist()) for _, key_means in means.values()]
        if len(set().union(*keys)) < sum(map(len, keys)):
            return "tensor parallelism splits its queries, and several processes hold the same keys"
        return [x.to(mine[0].device).clamp(self._least, self._most) for x in means[part]]

    def make(self, spread: Spread, values: Tensor) -> nn.Parameter:
        """A parameter that starts at these values of this process's heads, for a layer whose weights lie so."""
        if spread.part not in self._groups:
            self._groups[spread.part] = peers.group_of(peers.gathered(spread.part))
        group = self._groups[spread.part]
        with torch.inference_mode(False):
            gain = nn.Parameter(spread.by_head(values.detach().clone()))
        if peers.processes(group) > 1:
            # Data parallelism averages the gradients of the parameters that it knew at its start.
            gain.register_post_accumulate_grad_hook(partial(_average, group=group))
        return gain


def _mean_rms(x: Tensor) -> Tensor:
    """(H,) fp32: the mean over rows of the root mean square of (B, H, M, D)."""
    return x.detach().float().square().mean(-1).sqrt().mean((0, 2)).nan_to_num(1.0)


def _once(key: Tensor) -> Tensor:
    """(B, H_kv, N, D) of keys that may be repeated for groups of query heads."""
    heads = key.shape[1]
    for group in (g for g in range(heads, 1, -1) if heads % g == 0):
        parts = key.detach().unflatten(1, (-1, group))
        if bool((parts == parts[:, :, :1]).all()):
            return parts[:, :, 0]
    return key


def _average(parameter: Tensor, group: Any) -> None:
    assert parameter.grad is not None  # a hook that runs when it is there
    gradient = own_part(parameter.grad.detach())
    dist.all_reduce(gradient, group=group)
    gradient /= peers.processes(group)
