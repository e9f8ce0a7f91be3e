"""Which processes a monitor puts together if nobody says: those of the world, where they run the same heads."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch import nn

from ..errors import let_out
from ..interventions import peers
from ..names import display_name, named_modules
from .agreement import Together
from .process_groups import ProcessGroups

_log = logging.getLogger("hnf_attention")
AUTO: Literal["auto"] = "auto"
Ranks = ProcessGroups | Literal["auto"] | None
_COMPARED_LAYERS, _COMPARED_SIDE = 4, 8
# Copies of one weight agree to rounding, or nearly so if each process trains its own for a while; weights of other
# layers and other heads are independent.
_SAME_WEIGHTS = 0.5


def resolve(ranks: Ranks, model: nn.Module) -> tuple[Together | None, bool]:
    """The processes to put together, None for this one alone; and whether this one writes and logs.

    ranks: AUTO takes the world's process group. Where a model's weights show that processes hold different heads, it
        warns once and takes this process alone. None: this process alone. Raises TypeError for anything else that is no
        `ProcessGroups`.
    """
    if isinstance(ranks, ProcessGroups):
        return Together(ranks), ranks.leads
    if ranks is None:
        return None, True
    if ranks != AUTO:
        raise TypeError(f"expected ranks to be {AUTO!r}, None or a ProcessGroups, got {ranks!r}")
    world = ProcessGroups.of_world()
    if world is None:
        return None, True
    why = _split_weights(model)
    if why is None:
        return Together(world, lambda: _different_models(model)), world.leads
    if world.leads:
        _log.warning(
            "the attention monitor measures each process alone, because %s; process 0 writes and logs its own heads. "
            'ranks=ProcessGroups.of_mesh(mesh, heads="tp") puts the processes of a device mesh together',
            why,
        )
    return None, world.leads


def _split_weights(model: nn.Module) -> str | None:
    """Why processes hold different heads, as far as the weights of one process show it."""
    for name, parameter, managed in _parameters(model):
        if "expert" in name.lower():  # experts are split without splitting attention
            continue
        if getattr(parameter, "tensor_model_parallel", False):  # Megatron's mark
            return f"the weight {name} is split by tensor parallelism"
        placements = getattr(parameter, "placements", ())
        split = sum(not placement.is_replicate() for placement in placements)
        if split > int(managed):  # FSDP2 itself splits each weight once
            return f"the weight {name} is split over processes as {placements}"
    return None


def _parameters(model: nn.Module) -> Iterator[tuple[str, Any, bool]]:
    """Every parameter with its name, and whether FSDP2 manages it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # imported already if it sharded the model
    managed = {
        id(parameter)
        for module in model.modules()
        if fsdp is not None and isinstance(module, fsdp.FSDPModule)
        for parameter in module.parameters()
    }
    for name, parameter in model.named_parameters():
        yield name, parameter, id(parameter) in managed


def _different_models(model: nn.Module) -> str | None:
    """Why the processes' layers of the same name are not copies of each other; the same answer in all processes.

    Stages of a pipeline that number their layers alike, and heads that are split by hand, would be added up.
    """
    samples: Sequence[Mapping[str, np.ndarray] | str]
    try:
        mine = _sample(model)
    except Exception as error:  # of any kind: the others wait for this process in the collective operation
        samples = peers.gathered(f"{type(error).__name__}: {error}")
        let_out(error)
    else:
        samples = peers.gathered(mine)
    first: dict[str, tuple[int, np.ndarray]] = {}
    for rank, theirs in enumerate(samples):
        if isinstance(theirs, str):
            return f"process {rank} could not read its weights ({theirs})"
        for name, weights in theirs.items():
            other, known = first.setdefault(name, (rank, weights))
            if known.shape != weights.shape or float(known @ weights) < _SAME_WEIGHTS:
                return (
                    f"processes {other} and {rank} hold different weights in the layer {display_name(name)}"
                )
    return None


def _sample(model: nn.Module) -> dict[str, np.ndarray]:
    """A few weights of the first layers, those of attention before others, as vectors of length 1."""
    found: dict[str, np.ndarray] = {}
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in model.modules()):
        return found  # every process holds another part of each weight
    attention_first = sorted(named_modules(model), key=lambda item: "att" not in item[0].lower())
    for name, module in attention_first:
        weight = next((p for p in module.parameters(recurse=False) if p.dim() == 2), None)
        whole = (
            weight is not None and weight.numel() and not hasattr(weight, "placements") and not weight.is_meta
        )
        if not whole or isinstance(module, nn.Embedding):
            continue
        corner = weight.detach()[:_COMPARED_SIDE, :_COMPARED_SIDE]  # type: ignore[union-attr]
        values = corner.flatten().double().cpu().numpy()
        length = np.linalg.norm(values)
        if np.isfinite(length) and length > 0:
            found[name] = values / length
        if len(found) == _COMPARED_LAYERS:
            break
    return found
