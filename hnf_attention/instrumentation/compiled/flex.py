"""FlexAttention in a compiled graph: an operator beside it, which measures when the graph runs.

Dynamo traces the functions over its scores into graphs of their own. What the functions hold, tensors and numbers,
comes into these as arguments. The operator gets the arguments as they are at each run, and finds the graphs by a hash
of their code, so that a graph that another process compiled means the same here.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.nn.attention import flex_attention as flex

from ... import compat
from ...compat import dynamo
from ...errors import let_out
from ..call import AttentionCall, Unmeasurable
from ..flex_call import Mod, described
from . import layers, operators, tracer

_UNREAD = "functions over its scores that cannot be read there"

_log = logging.getLogger("hnf_attention")


class _Functions(NamedTuple):
    """A score_mod, None where it changes nothing, and a mask_mod, None where it hides nothing.

    Both take what they hold after their own arguments. are_tensors: which of that, in order, are tensors; the others
    are numbers. of_scores: how many of them are score_mod's.
    """

    score_mod: fx.GraphModule | None
    mask_mod: fx.GraphModule | None
    are_tensors: tuple[bool, ...]
    of_scores: int

    def bound(self, tensors: Sequence[Tensor], numbers: Sequence[int]) -> tuple[Mod | None, Mod | None]:
        each = iter(tensors), iter(numbers)
        held = [next(each[0] if is_tensor else each[1]) for is_tensor in self.are_tensors]
        return _with(self.score_mod, held[: self.of_scores]), _with(self.mask_mod, held[self.of_scores :])


#: By a hash of their code.
_known: dict[str, _Functions] = {}


def _with(function: fx.GraphModule | None, held: list[Any]) -> Mod | None:
    return None if function is None else lambda *own: function(*own, *held)


def beside(
    interceptor: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: flex.BlockMask | None,
    scale: float | None,
    sinks: Tensor | None,
) -> None:
    """Leave the operator in the graph, after the call of flex_attention. To be traced; `_read` sets local variables."""
    layer, _heads = tracer.find_layer(query, key, value, sinks, numbers=(scale,))
    if layer is None:
        return
    functions: str | None = None
    tensors: list[Tensor] = []
    numbers: list[int] = []
    dynamo.comptime()(_read)
    if functions is None:
        operators.unmeasured(layer, _UNREAD)
        return
    blocks: list[Tensor] = []
    sizes: list[int] = []
    if block_mask is not None:
        full = block_mask.full_kv_num_blocks, block_mask.full_kv_indices
        blocks = [block_mask.kv_num_blocks, block_mask.kv_indices, *(x for x in full if x is not None)]
        sizes = [*block_mask.seq_lengths, *block_mask.BLOCK_SIZE]
    inputs = operators.inputs(query, key, value)
    sinks = operators.detached(sinks)
    _operator(layer, *inputs, blocks, sizes, functions, tensors, numbers, scale, sinks, interceptor)


def _read(context: Any) -> None:
    """Set the local variables of `beside` by the flex_attention that was traced last. No error may come out."""
    try:
        frame = dynamo.Frame(context)
        frame.assign(_functions_of(frame))
    except Exception as error:  # another version of Dynamo
        let_out(error)
        _log.warning("hnf-attention does not reach flex_attention in this compiled graph", exc_info=error)


def _functions_of(frame: dynamo.Frame) -> dict[str, Any]:
    """The local variables of `beside`, by name, as Dynamo's variables."""
    call = frame.last_call(torch.ops.higher_order.flex_attention)
    if call is None:  # Dynamo could not trace its functions, and broke the graph
        return {}
    arguments: Any = call.args
    _query, _key, _value, score_mod, block_mask, _scale, _options, of_scores, of_mask = arguments
    functions = [frame.subgraph(node) for node in (score_mod, block_mask[-1])]
    held = [*of_scores, *of_mask]
    values = [frame.example(node) for node in held]
    known = all(isinstance(value, (Tensor, torch.SymInt)) for value in values)
    if not known or any(node.op == "get_attr" for function in functions for node in function.graph.nodes):
        return {}
    are_tensors = [isinstance(value, Tensor) for value in values]
    tensors = [frame.detached(node) for node, is_tensor in zip(held, are_tensors) if is_tensor]
    numbers = [frame.number(node) for node, is_tensor in zip(held, are_tensors) if not is_tensor]
    code = "".join(function.code for function in functions)
    name = hashlib.sha256(f"{code}{are_tensors}".encode()).hexdigest()
    bare_score_mod, bare_mask_mod = map(_bare, functions)
    _known[name] = _Functions(bare_score_mod, bare_mask_mod, tuple(are_tensors), len(of_scores))
    return {
        "functions": dynamo.constant(name),
        "tensors": dynamo.sequence(tensors),
        "numbers": dynamo.sequence(numbers),
    }


def _bare(function: fx.GraphModule) -> fx.GraphModule | None:
    """A copy that keeps nothing of its trace alive; None if it returns its first argument."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(function.graph, {}))
    for node in graph.nodes:
        node.meta.clear()
    first, *_, last = graph.nodes
    return None if last.args[0] in (first, (first,)) else fx.GraphModule({}, graph)


def _measure(
    layer: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: list[Tensor],
    sizes: list[int],
    functions: str,
    tensors: list[Tensor],
    numbers: list[int],
    scale: float | None,
    sinks: Tensor | None,
    interceptor: str,
) -> None:
    """What the operator does when its graph runs."""
    owner = layers.owner_of(layer)
    if owner is None:
        return

    def describe() -> AttentionCall:
        known = _known.get(functions)
        if known is None:
            raise Unmeasurable(f"a compiled graph calls it with {_UNREAD}")
        score_mod, mask_mod = known.bound(tensors, numbers)
        block_mask = _block_mask(blocks, sizes, mask_mod) if blocks else None
        return described(
            interceptor, query, key, value, score_mod, block_mask, compiled=True, scale=scale, sinks=sinks
        )

    with compat.vmap_in_operators():
        operators.measure(owner, describe)


def _block_mask(blocks: list[Tensor], sizes: list[int], mask_mod: Mod | None) -> flex.BlockMask:
    num_queries, num_keys, height, width = sizes
    count, index, *full = blocks
    full_count, full_index = full or (None, None)
    return flex.BlockMask.from_kv_blocks(
        count,
        index,
        full_count,
        full_index,
        seq_lengths=(num_queries, num_keys),
        BLOCK_SIZE=(height, width),
        mask_mod=mask_mod,
        compute_q_blocks=False,
    )


_operator = operators.operator(
    "observe_flex",
    "Tensor query, Tensor key, Tensor value, Tensor[] blocks, SymInt[] sizes, str functions, Tensor[] tensors, "
    "SymInt[] numbers, float? scale, Tensor? sinks, str interceptor",
    _measure,
)
