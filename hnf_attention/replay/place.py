"""Where in the model a root lies: layer, heads, tensor and row."""

from __future__ import annotations

from ..diagnosis.triage.case import Numbers, Place, is_exponential, is_softmax
from ..diagnosis.triage.records import BACKWARD, BATCH, FORWARD, PARAMETER, Record
from ..diagnosis.triage.roots import OPERATION, SOURCE, Root
from .calls import TENSORS, Calls, Seen, plain
from .recorder import Captured

_GRADIENTS = ("gradient of query", "gradient of key", "gradient of value")
_PROJECTED = ("query", "key", "value")


def find_place(
    root: Root, record: Record, calls: Calls, numbers: Numbers, captured: Captured | None
) -> Place:
    """The place of a root."""
    operation = root.operation
    module = operation.module
    source = record.names.get(root.tensor.memory)
    if root.source is not None and root.source.kind == PARAMETER:
        module = root.source.name.rpartition(".")[0]  # what reads it may be a module around its own
    elif module is None and source is not None:
        # An optimizer, or what checks gradients, has a tensor of some module.
        module = (source.parameter or source.name).rpartition(".")[0] or None
    layer = calls.layer_of(module)
    if layer is None and len(numbers.shape) == 4 and (is_exponential(operation) or operation.is_attention):
        layer = module  # attention in a module that no name tells as such
    if layer is None:
        return _outside(root, calls, module, numbers)
    seen = calls.first(layer)
    reached = () if seen is None else tuple(name for name in TENSORS if name in seen.heads)
    known = reached if seen is not None and seen.head_dim else ()
    role = _role(root, record, layer, reached)
    tensor = role if root.kind != SOURCE else "mask" if root.source is None else root.source.name
    if root.kind == OPERATION and module == layer:
        found = _by_shape(numbers, seen, captured)
        if found is not None:
            heads, batch, row = found
            return Place(layer, True, heads, tensor, batch, row, role, known)
    if seen is None or not reached or operation.phase != FORWARD:
        return Place(layer, True, (), tensor, None, None, role, known)
    batch, row = seen.rows[reached[0]]
    return Place(layer, True, seen.heads[reached[0]], tensor, batch, row, role, known)


def _outside(root: Root, calls: Calls, module: str | None, numbers: Numbers) -> Place:
    """Of what no attention layer ran. The first layer that it reached tells a mask that the run was given."""
    if root.kind == SOURCE and root.source is not None and root.source.kind != BATCH:
        return Place(module, False, (), root.source.name)
    first = next((seen for seen in calls.seen if seen.heads), None)
    if root.kind == SOURCE and first is not None and not set(_PROJECTED) & set(first.heads):
        reached = tuple(first.heads)
        batch, row = first.rows[reached[0]]
        known = reached if first.head_dim else ()
        return Place(plain(first.layer), True, first.heads[reached[0]], "mask", batch, row, "", known)
    if root.kind == SOURCE:
        return Place(module, False, (), "input" if root.source is None else root.source.name)
    if len(numbers.index) == 3:
        return Place(module, False, (), "activations", *numbers.index[:2])
    return Place(module, False)


def _role(root: Root, record: Record, layer: str, reached: tuple[str, ...]) -> str:
    """Which tensor of an attention layer the operation makes, or reads."""
    operation = root.operation
    if operation.phase == BACKWARD:
        names = _GRADIENTS if operation.is_attention and root.tensor.name.isdecimal() else ()
        place = int(root.tensor.name) if names else 0
        return names[place] if place < len(names) else "gradients"
    if operation.phase != FORWARD:
        named = record.names.get(root.tensor.memory)
        return "" if named is None else named.name
    if operation.module == layer:
        if operation.is_attention:
            return "out"
        if is_softmax(operation) or is_exponential(operation):
            return "weights"
        own = [x for x in record.operations if x.module == layer and x.phase == FORWARD]
        if not any(is_softmax(x) or is_exponential(x) for x in own if x.index > operation.index):
            return "out"
        if any(x.packet in ("bmm", "baddbmm") for x in own if x.index <= operation.index):
            return "scores"
    return next((name for name in _PROJECTED if name in reached), "a projection")


def _by_shape(
    numbers: Numbers, seen: Seen | None, captured: Captured | None
) -> tuple[tuple[int, ...], int, int] | None:
    """(query heads, batch, row) by the result's dimensions; None if they do not tell the heads."""
    index, shape = numbers.index, numbers.shape
    views = [x for x in (() if captured is None else captured.shapes) if len(x) == 4]
    if len(shape) == 4:
        (batch, _, row), heads, broken = index[:3], shape[1], numbers.second
    elif len(shape) == 3 and (views or seen is not None):
        heads = max(1, views[0][1] if views else 0 if seen is None else seen.num_heads)
        batch, row = index[0] // heads, index[1]
        broken = tuple(sorted({at % heads for at in numbers.first}))
    else:
        return None
    if seen is None:
        return broken, batch, row
    if heads not in (seen.num_heads, seen.num_key_heads) or (len(shape) == 3 and shape[0] % heads):
        return None
    group = seen.num_heads // heads
    return tuple(head * group + member for head in broken for member in range(group)), batch, row
