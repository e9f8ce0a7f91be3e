"""Proof by lengths: rows that are a head's queries have, at the projection, the lengths that the head's queries have.

Rotations keep lengths, so this holds with rotary positions. A factor that all queries of a layer share is allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .. import compat
from .projections import Projections

#: Between lengths, of the length: rounding in bf16 stays below; other orders of rows are off by 0.4 and more.
TOLERANCE = 0.05

#: Runs the layer once. Returns the queries and keys of its attention, (B, H, M, D) each; None if they were not seen.
Run = Callable[[], "tuple[Tensor, Tensor] | None"]


@torch.no_grad()
def contradiction(layer: nn.Module, projections: Projections, run: Run) -> str | None:
    """What of the lengths contradicts these projections; None for nothing, and where lengths cannot be compared.

    layer: the module that holds the projections.
    """
    outputs: dict[int, list[Tensor]] = {}
    holders = {id(w): m for m in layer.modules() if (w := compat.own_parameter(m, "weight")) is not None}
    held = [holders[id(p)] for p in projections.parameters if id(p) in holders]
    hooks = [
        module.register_forward_hook(lambda m, _, out: outputs.setdefault(id(m), []).append(out))
        for module in set(held)
    ]
    try:
        seen = run()
    finally:
        for hook in hooks:
            hook.remove()
    if seen is None:
        return None
    query, key = seen
    sides = [("query", [*projections.query[:1], *projections.rest[:1]], projections.num_heads, query)]
    if not projections.rest:  # latent keys have a part that comes from elsewhere
        sides.append(("key", projections.key[:1], projections.num_key_heads, key))
    for name, views, heads, called in sides:
        lengths = _projected(views, held, outputs)
        if lengths is None or called.shape[1] % heads:
            continue
        called = called[:, :: called.shape[1] // heads] if name == "key" else called
        if called.shape[1] != heads or called.shape[0] * called.shape[2] != len(lengths):
            continue
        found = torch.linalg.vector_norm(called.double(), dim=-1).transpose(1, 2).flatten(0, 1)
        ratios = found.sort(0).values / lengths.sort(0).values.clamp(min=1e-30)
        off = float((ratios / ratios.median() - 1).abs().max())
        if not off <= TOLERANCE:
            return (
                f"the lengths of a head's {name} rows at the projection and at the attention differ by {off:.2g} of "
                "them (another order of rows, or a norm in between)"
            )
    return None


def _projected(
    views: Sequence[Tensor], held: Sequence[nn.Module], outputs: dict[int, list[Tensor]]
) -> Tensor | None:
    """Lengths of the heads' rows of what the projections gave, (rows, H) fp64; None if that is not known."""
    square = None
    for view in views:
        module = next((m for m in held if _shares(view, m)), None)
        if module is None or len(outputs.get(id(module), [])) != 1:
            return None
        index = _rows(view, module).to(outputs[id(module)][0].device)
        given = outputs[id(module)][0].double().flatten(0, -2)[:, index]  # (rows, H, D)
        own = given.square().sum(-1)
        square = own if square is None else square + own
    return None if square is None else square.sqrt()


def _shares(view: Tensor, module: nn.Module) -> bool:
    weight = compat.own_parameter(module, "weight")
    return weight is not None and view.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()


def _rows(view: Tensor, module: nn.Module) -> Tensor:
    """Which outputs of the projection the heads' rows are, (H, D) int64: the view, laid over the outputs' numbers."""
    weight = compat.own_parameter(module, "weight")
    assert weight is not None  # `_shares`
    transposed = type(module).__name__ == "Conv1D"  # weight (inputs, outputs)
    numbers = torch.arange(weight.shape[1 if transposed else 0])
    table = (numbers[None, :] if transposed else numbers[:, None]).expand(weight.shape).contiguous()
    offset = view.storage_offset() - weight.storage_offset()
    laid = table.as_strided(view.shape, view.stride(), offset)[
        ..., 0
    ]  # (H, D), or (key heads, heads of each, D)
    return laid if laid.dim() == 2 else laid.flatten(0, 1)
