"""The gains of QK-norm: what they start at, and how processes keep them alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..names import display_name
from . import peers
from .shards import HeadPart, Spread, own_part

#: What a process calls whose forward an error ended, in place of a layer.
_AN_ERROR = "an error"


class Gains:
    """Makes the gains of layers, query (H,) and key (H_kv,), fp32, between `least` and `most`.

    group: the processes that hold the same layers; None for all. Each has to make those of the same layers, in the same
    order.
    """

    def __init__(self, least: float, most: float, group: Any = None):
        self._least, self._most, self._group = least, most, group
        # Of each layer's heads, the part of every process, by rank in the group.
        self._parts: dict[str, list[HeadPart]] = {}

    def check_layers(self, layers: Iterable[str]) -> None:
        """Raise ValueError in every process if one holds other layers. layers: names of those that may be attention."""
        everyone = peers.numbered(frozenset(layers), self._group)
        some, all_of_them = frozenset.intersection(*everyone.values()), frozenset.union(*everyone.values())
        if some != all_of_them:
            layer = min(all_of_them - some)
            holders = [number for number, names in everyone.items() if layer in names]
            raise ValueError(
                "expected processes that hold the same layers for QK-norm, got "
                f"{display_name(layer)} in {peers.named(holders)} alone: in a pipeline, give group=, the processes of "
                "one stage"
            )

    @torch.no_grad()
    def measured(
        self, layer: str, part: HeadPart, query: Tensor, key: Tensor, reason: str | None
    ) -> list[Tensor] | str:
        """Each head's mean root mean square of queries and keys (B, H, M, D), over all processes that hold the head.

        A text says why there can be none, the same in all processes. part: of the heads, those that this process holds.
        reason: why this process cannot have any.
        """
        mine = [] if reason is not None else [_mean_rms(query), _mean_rms(once(key))]
        everyone = self._at(layer, (part, reason, [x.tolist() for x in mine]))
        refusal = peers.told({number: theirs for number, (_, theirs, _) in everyone.items()})
        if refusal is not None:
            return refusal
        if len({tuple(map(len, values)) for _, _, values in everyone.values()}) > 1:
            return "processes have different numbers of its heads"
        self._parts[layer] = [theirs for theirs, _, _ in everyone.values()]
        same = [values for theirs, _, values in everyone.values() if theirs == part]
        means = [torch.tensor(x).mean(0) for x in zip(*same)]
        return [x.to(mine[0].device).clamp(self._least, self._most) for x in means]

    def end(self, *, failed: bool = False) -> None:
        """The forward is over. failed: by an error.

        Raises ValueError if another process called a further layer in it, or if it failed in some of them alone.
        """
        self._at(_AN_ERROR if failed else None, None)

    def resume(self, parts: Mapping[str, HeadPart], reason: str | None) -> None:
        """Take in the layers that a state has gains of. Raises ValueError in every process if one has a reason to."""
        everyone = peers.numbered((dict(parts), reason), self._group)
        refusal = peers.told({number: theirs for number, (_, theirs) in everyone.items()})
        if refusal is None and len({frozenset(theirs) for theirs, _ in everyone.values()}) > 1:
            refusal = "expected gains of the same layers in all processes, got those of different ones"
        if refusal is not None:
            raise ValueError(refusal)
        self._parts = {layer: [theirs[layer] for theirs, _ in everyone.values()] for layer in parts}

    def make(self, layer: str, spread: Spread, values: Tensor) -> nn.Parameter:
        """A parameter that starts at these values of this process's heads, for a layer whose weights lie so."""
        parts = self._parts[layer]
        with torch.inference_mode(False):
            gain = nn.Parameter(spread.by_head(values.detach().clone()))
        if len(set(parts)) < len(parts):
            # Data parallelism averages the gradients of the parameters that it knew at its start.
            copies = parts.count(spread.part)
            gain.register_post_accumulate_grad_hook(
                partial(_average, part=spread.part, copies=copies, group=self._group)
            )
        return gain

    def _at(self, layer: str | None, found: Any) -> dict[int, Any]:
        """What every process found in its call of the layer, by number; None for the end of its forward.

        Raises ValueError in every process if they do not call the same layer.
        """
        everyone = peers.numbered((layer, found), self._group)
        layers = {number: theirs for number, (theirs, _) in everyone.items()}
        if len(set(layers.values())) > 1:
            said = [
                f"{'none any more' if name is None else display_name(name)} in process {number}"
                for number, name in layers.items()
            ]
            raise ValueError(
                "expected every process to call the same layers in the forward that starts QK-norm, got "
                f"{', '.join(said)}"
            )
        return {number: theirs for number, (_, theirs) in everyone.items()}


def _mean_rms(x: Tensor) -> Tensor:
    """(H,) fp32: the mean over rows of the root mean square of (B, H, M, D)."""
    return x.detach().float().square().mean(-1).sqrt().mean((0, 2)).nan_to_num(1.0)


def once(key: Tensor) -> Tensor:
    """(B, H_kv, N, D) of keys that may be repeated for groups of query heads. Keys that are all zero tell nothing."""
    heads = key.shape[1]
    if not key.any():
        return key
    for group in (g for g in range(heads, 1, -1) if heads % g == 0):
        parts = key.detach().unflatten(1, (-1, group))
        if bool((parts == parts[:, :, :1]).all()):
            return parts[:, :, 0]
    return key


def _average(parameter: Tensor, part: HeadPart, copies: int, group: Any) -> None:
    """Average a gradient over the processes that hold the same heads, so many, in one sum for all heads."""
    assert parameter.grad is not None  # a hook that runs when it is there
    gradient = own_part(parameter.grad.detach())
    every_head = gradient.new_zeros(len(gradient) * part.count)
    mine = every_head[part.of(len(every_head))]
    mine.copy_(gradient)
    dist.all_reduce(every_head, group=group)
    gradient.copy_(mine / copies)
