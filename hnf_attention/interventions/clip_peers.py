"""The processes that hold the same layers, whole or in parts: what `QKClip` does in all of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..names import display_name, named_modules
from . import peers
from .shards import HeadPart, Spread
from .sizes import ScoreSizes


@dataclass(frozen=True)
class _Seen:
    """What one process knows of a layer. heads: of all processes. device: the type of that of its sizes."""

    heads: int
    device: str


@dataclass(frozen=True)
class _Held:
    """A layer's heads, and those of them that this process holds."""

    heads: int
    part: HeadPart

    @property
    def mine(self) -> slice:
        return self.part.of(self.heads)

    @property
    def own_heads(self) -> int:
        return len(range(self.heads)[self.mine])


class ClipPeers:
    """Has the processes of a group clip the same layers, by sizes of all of them.

    group: those that hold the same layers; None for all of torch.distributed.
    held: the layers that they know of, the same in the same order in every process, after `meet`.
    """

    def __init__(self, model: nn.Module, group: Any):
        peers.check_group(group)
        self._model, self._group = model, group
        self.held: dict[str, _Held] = {}
        self._refused: set[str] = set()
        self._look: Callable[[str, int], str | None] = lambda layer, heads: None
        self._largest: dict[str, Tensor] = {}  # of the step that runs, those that were not asked for yet

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return peers.processes(self._group) == 1

    def meet(self, sizes: ScoreSizes, look: Callable[[str, int], str | None]) -> dict[str, str]:
        """Agree on the layers to clip. Every process has to ask. Returns those that no process clips, and why.

        A layer that one process has seen is one of all. look: says of a layer, with this number of own heads, why this
        process cannot clip it; None if it can.
        Raises RuntimeError in every process if none has seen a layer, and ValueError in every process if one does not
        hold a layer of another.
        """
        self._look, self._largest = look, {}
        if self.alone:
            self.held = {name: _Held(len(layer.largest), HeadPart()) for name, layer in sizes.layers.items()}
            self._check_seen(self.held, sizes)
            return {}
        modules = dict(named_modules(self._model))
        mine = {
            name: _Seen(len(layer.largest) * _part(modules, name).count, layer.largest.device.type)
            for name, layer in sizes.layers.items()
        }
        seen: dict[str, set[_Seen]] = {}
        for theirs in peers.gathered(mine, self._group):
            for name, one in theirs.items():
                seen.setdefault(name, set()).add(one)
        self._check_seen(seen, sizes)
        self.held = {}
        reasons: dict[str, str] = {}
        missing: list[str] = []
        for name in sorted(seen):
            if name not in mine and name.partition("#")[0] not in modules:
                missing.append(name)
                continue
            reason = self._take_in(name, seen[name], _part(modules, name), sizes) or look(
                name, self.held[name].own_heads
            )
            if reason is not None:
                reasons[name] = reason
        everyone = peers.numbered((missing, reasons), self._group)
        self._check_held({number: names for number, (names, _) in everyone.items()})
        told = {
            name: peers.told({n: theirs.get(name) for n, (_, theirs) in everyone.items()}) for name in seen
        }
        refused = {name: reason for name, reason in told.items() if reason is not None}
        self._refused = set(refused)
        return refused

    def largest(self, names: Sequence[str], sizes: ScoreSizes, refused: set[str]) -> list[Tensor]:
        """The sizes of this process's heads by layer, over all processes; inf for heads that one of them cannot judge.

        names: of layers on one device; each is asked for once a step. refused: layers that this process cannot clip any
            more.
        Processes may spread their layers over different devices, so all layers share one reduction on one device.
        """
        if self.alone:
            return [sizes.layers[name].largest for name in names]
        if any(name not in self._largest for name in names):
            others = [name for name in self.held if name not in names and name not in refused]
            lost = {name for name in others if self._look(name, self.held[name].own_heads) is not None}
            self._largest = self._over_all(sizes, (refused | lost) - self._refused)
        return [self._largest.pop(name).to(sizes.layers[name].largest.device) for name in names]

    def _over_all(self, sizes: ScoreSizes, lost: Collection[str]) -> dict[str, Tensor]:
        """The sizes of this process's heads, over all processes, of all layers. lost: that it cannot clip any more."""
        rows: list[Tensor] = []
        for name, held in self.held.items():
            largest = sizes.layers[name].largest
            row = largest.new_full((held.heads,), -torch.inf)
            if name in lost or len(largest) != held.own_heads:
                row.fill_(torch.inf)
            else:  # a maximum may lose a NaN
                row[held.mine] = torch.where(largest.isnan(), torch.inf, largest)
            rows.append(row.to(rows[0].device) if rows else row)
        together = torch.cat(rows)
        dist.all_reduce(together, dist.ReduceOp.MAX, group=self._group)
        split = together.split([held.heads for held in self.held.values()])
        return {name: row[held.mine] for (name, held), row in zip(self.held.items(), split)}

    def _take_in(self, name: str, seen: set[_Seen], part: HeadPart, sizes: ScoreSizes) -> str | None:
        """Hold a layer from now on, also if this process has not seen it. Returns why no process can clip it."""
        if len(seen) > 1:
            kinds = ", ".join(sorted(f"{one.heads} on {one.device}" for one in seen))
            return f"processes have different numbers of its heads, or on other kinds of devices: {kinds}"
        (one,) = seen
        held = _Held(one.heads, part)
        if one.heads % part.count:
            return f"its {one.heads} heads are not in equal parts in {part.count} processes"
        self.held[name] = held
        if name not in sizes.layers:
            number = f":{torch.cuda.current_device()}" if one.device == "cuda" else ""
            sizes.expect(name, held.own_heads, torch.device(one.device + number))
        return None

    @staticmethod
    def _check_seen(layers: Collection[str], sizes: ScoreSizes) -> None:
        if not layers:
            raise RuntimeError(
                "expected a training forward of the model before QKClip.step(), got none whose attention was measured: "
                f"{sizes.handle.coverage}"
            )

    @staticmethod
    def _check_held(missing: Mapping[int, Sequence[str]]) -> None:
        lacking = {number: names for number, names in missing.items() if names}
        if lacking:
            layer = next(iter(lacking.values()))[0]
            raise ValueError(
                "expected processes that hold the same layers for QKClip, got none of the name "
                f"{display_name(layer)} in {peers.named(list(lacking))}: in a pipeline, give group=, the processes "
                "of one stage"
            )


def _part(modules: Mapping[str, nn.Module], layer: str) -> HeadPart:
    return Spread.of(modules, layer).part if layer in modules else HeadPart()
