"""All numbers of a training run, copied off the device beside the training, and copied back in place."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .shards import own_part

#: What schedules change in a parameter group. The rest of it belongs to the run, as an epsilon that was raised.
_SCHEDULED = ("lr", "betas", "momentum", "weight_decay")


class _Place(NamedTuple):
    """Where a tensor lives. optimizer, name: of an optimizer's state of `parameter`; else the tensor is its own.

    buffer: the name of a module's buffer, which a forward may assign anew.
    """

    tensor: Tensor
    parameter: Tensor | None = None
    optimizer: int = 0
    name: str = ""
    buffer: str = ""


class _Kept(NamedTuple):
    """A tensor's numbers on the host, and where it lived."""

    place: _Place
    numbers: Tensor


class Slot:
    """One state on the host. Its memory is used again for a later one.

    step: when it was taken. done: how many steps led to it.
    """

    def __init__(self) -> None:
        self.step = self.done = 0
        self.kept: dict[Hashable, _Kept] = {}
        self.others: dict[str, Any] = {}
        self._norms: list[Tensor] = []
        self._events: list[tuple[torch.device, torch.cuda.Event]] = []

    @property
    def bytes(self) -> int:
        """Host memory."""
        return sum(kept.numbers.nbytes for kept in self.kept.values())

    @property
    def finite(self) -> bool:
        """Whether no number is NaN or inf; waits for the copy."""
        self.wait()
        return all(bool(norms.isfinite().all()) for norms in self._norms)

    def settle(self) -> None:
        """Have the current streams wait for the copy."""
        self._events = [(device, event) for device, event in self._events if not event.query()]
        for device, event in self._events:
            event.wait(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Have the host wait for the copy."""
        for _, event in self._events:
            event.synchronize()
        self._events = []

    def join(self, parameter: Tensor, optimizer: int) -> None:
        """Take in a parameter that came to the run later, with the numbers that it has now and no optimizer state.

        optimizer: the number of the one that trains it.
        """
        numbers = own_part(parameter.detach()).to("cpu", copy=True)
        self.kept[id(parameter)] = _Kept(_Place(parameter), numbers)
        self.others["states"].append((optimizer, parameter, {}))

    def end(self, norms: list[Tensor], events: list[tuple[torch.device, torch.cuda.Event]]) -> None:
        """The copies are queued. norms: largest |numbers|, on the host or on their way."""
        self._norms, self._events = norms, events


class TrainingState:
    """What a run's state consists of: see `GoodStates`."""

    def __init__(
        self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], scheduler: Any, rng: bool
    ):
        self.model, self._optimizers, self._rng = model, optimizers, rng
        given = scheduler if isinstance(scheduler, (list, tuple)) else [scheduler]
        self.schedulers = [one for one in given if one is not None]
        for one in self.schedulers:
            if not (hasattr(one, "state_dict") and hasattr(one, "load_state_dict")):
                raise TypeError(f"expected a scheduler with state_dict, got {type(one).__name__}")
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @torch.no_grad()
    def save(self, slot: Slot, step: int, done: int) -> None:
        """Start to copy the state into the slot. Weights must not change before the device is through."""
        slot.step, slot.done = step, done
        old, slot.kept = slot.kept, {}
        by_device: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
        for key, place, changing in self._places():
            source = own_part(place.tensor.detach())
            known = old.get(key)
            numbers = None if known is None else known.numbers
            if numbers is None or numbers.shape != source.shape or numbers.dtype != source.dtype:
                numbers = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            if source.is_cuda and changing:  # the next forward may write to it
                source = source.clone()
            slot.kept[key] = _Kept(place, numbers)
            by_device.setdefault(source.device, []).append((numbers, source))
        norms: list[Tensor] = []
        events: list[tuple[torch.device, torch.cuda.Event]] = []
        for device, pairs in by_device.items():
            if device.type == "cuda":
                norms.append(self._copy_beside(device, pairs, events))
            else:
                for numbers, source in pairs:
                    numbers.copy_(source)
                norms.append(_norms([numbers for numbers, _ in pairs]).cpu())
        slot.others = self._read_others()
        slot.end(norms, events)

    def _copy_beside(
        self,
        device: torch.device,
        pairs: Sequence[tuple[Tensor, Tensor]],
        events: list[tuple[torch.device, torch.cuda.Event]],
    ) -> Tensor:
        """Copy on a stream of its own. Returns the largest |number| of each tensor, on its way to the host."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for numbers, source in pairs:
                numbers.copy_(source, non_blocking=True)
                source.record_stream(stream)
            found = _norms([source for _, source in pairs])
            norms = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            norms.copy_(found, non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
        events.append((device, event))
        return norms

    @torch.no_grad()
    def load(self, slot: Slot) -> None:
        """Copy a state back, in place."""
        slot.wait()
        kept_states: dict[tuple[int, int], set[str]] = {}
        buffers = dict(self.model.named_buffers())
        held = [{id(p) for group in one.param_groups for p in group["params"]} for one in self._optimizers]
        for place, numbers in slot.kept.values():
            if place.parameter is None:
                own_part(buffers.get(place.buffer, place.tensor).detach()).copy_(numbers)
                continue
            if (
                id(place.parameter) not in held[place.optimizer]
            ):  # it left the run since, as gains that were reverted
                continue
            state = self._optimizers[place.optimizer].state[place.parameter]
            there = state.get(place.name)
            if isinstance(there, Tensor) and own_part(there).shape == numbers.shape:
                own_part(there.detach()).copy_(numbers)
            else:
                own_part(place.tensor.detach()).copy_(numbers)
                state[place.name] = place.tensor
            kept_states.setdefault((place.optimizer, id(place.parameter)), set()).add(place.name)
        for number, parameter, plain in slot.others["states"]:
            if id(parameter) not in held[number]:
                continue
            state = self._optimizers[number].state
            names = kept_states.get((number, id(parameter)), set()) | set(plain)
            if not names:
                state.pop(parameter, None)
                continue
            for name in [name for name in state[parameter] if name not in names]:
                del state[parameter][name]
            state[parameter].update(copy.deepcopy(plain))
        self._write_others(slot.others)

    def _places(self) -> Iterator[tuple[Hashable, _Place, bool]]:
        """(key, place, whether a forward may change it) of every tensor."""
        mine = set()
        for learned in self.model.parameters():
            mine.add(id(learned))
            yield id(learned), _Place(learned), False
        for name, buffer in self.model.named_buffers():
            yield ("buffer", name), _Place(buffer, buffer=name), True
        for number, optimizer in enumerate(self._optimizers):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if id(parameter) not in mine:  # fp32 masters
                        mine.add(id(parameter))
                        yield id(parameter), _Place(parameter), False
            for parameter, state in optimizer.state.items():
                if not isinstance(state, dict):
                    continue
                for name, value in state.items():
                    if isinstance(value, Tensor):
                        yield (number, id(parameter), name), _Place(value, parameter, number, name), False

    def _read_others(self) -> dict[str, Any]:
        states = []
        for number, optimizer in enumerate(self._optimizers):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    state = optimizer.state.get(parameter, {})
                    plain = {k: copy.deepcopy(v) for k, v in state.items() if not isinstance(v, Tensor)}
                    states.append((number, parameter, plain))
        found: dict[str, Any] = {"states": states}
        if self.schedulers:
            found["schedulers"] = [copy.deepcopy(one.state_dict()) for one in self.schedulers]
            groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
            found["groups"] = [
                {name: copy.deepcopy(group[name]) for name in _SCHEDULED if name in group} for group in groups
            ]
        if self._rng:
            cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
            found["rng"] = torch.get_rng_state(), cuda
        return found

    def _write_others(self, others: dict[str, Any]) -> None:
        for one, state in zip(self.schedulers, others.get("schedulers", [])):
            one.load_state_dict(copy.deepcopy(state))
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        for group, kept in zip(groups, others.get("groups", [])):
            for name, value in kept.items():
                if isinstance(group[name], Tensor):
                    group[name].copy_(value)
                else:
                    group[name] = copy.deepcopy(value)
        if "rng" in others:
            cpu, cuda = others["rng"]
            torch.set_rng_state(cpu)
            if cuda:
                torch.cuda.set_rng_state_all(cuda)


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    """Largest |number| of each tensor that has fractions, fp32; NaN or inf where one of its numbers is."""
    found = [
        torch.linalg.vector_norm(x, torch.inf).float()
        for x in tensors
        if x.is_floating_point() and x.element_size() > 1 and x.numel()
    ]
    return torch.stack(found) if found else torch.zeros(1)
