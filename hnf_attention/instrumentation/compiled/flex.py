"""FlexAttention in a compiled graph: an operator beside it, which measures when the graph runs.

Of the functions over its scores the graph has what Dynamo traced of them: graphs too, which take the tensors and
numbers that the functions held as arguments. The operator is given these as they are at each run, and finds the
graphs by what they compute, so that the same graph of another process means the same.
"""

from __future__ import annotations

import hashlib
import logging
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.nn.attention import flex_attention as flex

from ..call import AttentionCall, Unmeasurable
from ..interceptors.flex_call import Mod, described
from . import operators

_UNREAD = "functions over its scores that cannot be read there"

_log = logging.getLogger("hnf_attention")


class _Functions(NamedTuple):
    """A score_mod, None where it changes nothing, and a mask_mod, with what comes after their own arguments.

    are_tensors: of these, in order, which are tensors; the others are numbers. of_scores: how many are score_mod's.
    """

    score_mod: fx.GraphModule | None
    mask_mod: fx.GraphModule
    are_tensors: tuple[bool, ...]
    of_scores: int

    def bound(self, tensors: list[Tensor], numbers: list[int]) -> tuple[Mod | None, Mod]:
        each = iter(tensors), iter(numbers)
        held = [next(each[0] if is_tensor else each[1]) for is_tensor in self.are_tensors]
        mask_mod = _with(self.mask_mod, held[self.of_scores :])
        return None if self.score_mod is None else _with(self.score_mod, held[: self.of_scores]), mask_mod


#: By a hash of their code.
_known: dict[str, _Functions] = {}


def _with(function: fx.GraphModule, held: list[Any]) -> Mod:
    return lambda *own: function(*own, *held)


def beside(
    interceptor: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: flex.BlockMask | None,
    scale: float | None,
    sinks: Tensor | None,
) -> None:
    """Leave the operator in the graph, after the call of flex_attention; traced."""
    from torch._dynamo.comptime import comptime

    layer, _heads = operators.running(query, key, value, sinks, numbers=(scale,))
    if layer is not None:
        functions, tensors, numbers = None, [], []
        comptime(_read)
        if functions is None:
            operators.unmeasured(layer, _UNREAD)
        else:
            blocks, sizes = [], []
            if block_mask is not None:
                full = block_mask.full_kv_num_blocks, block_mask.full_kv_indices
                blocks = [
                    block_mask.kv_num_blocks,
                    block_mask.kv_indices,
                    *(x for x in full if x is not None),
                ]
                sizes = [*block_mask.seq_lengths, *block_mask.BLOCK_SIZE]
            inputs = operators.inputs(query, key, value)
            sinks = operators.detached(sinks)
            _operator(layer, *inputs, blocks, sizes, functions, tensors, numbers, scale, sinks, interceptor)


def _read(context: Any) -> None:
    """Set the locals of `beside` by the flex_attention that was traced last. No error may come out."""
    try:
        tracer = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
        tracer.symbolic_locals.update(_functions_of(tracer))
    except Exception as error:  # another version of Dynamo
        _log.warning("hnf-attention does not reach flex_attention in this compiled graph", exc_info=error)


def _functions_of(tracer: Any) -> dict[str, Any]:
    from torch._dynamo.variables import ConstantVariable, ListVariable, SymNodeVariable
    from torch._dynamo.variables.builder import wrap_fx_proxy

    graph, output = tracer.output.current_tracer, tracer.output
    calls = (x for x in reversed(graph.graph.nodes) if x.target is torch.ops.higher_order.flex_attention)
    call = next(calls, None)
    if call is None:  # Dynamo could not trace its functions, and broke the graph
        return {}
    _query, _key, _value, score_mod, block_mask, _scale, _options, of_scores, of_mask = call.args
    functions = [output.nn_modules[x.target] for x in (score_mod, block_mask[-1])]
    held = [(fx.Proxy(node, graph), node.meta["example_value"]) for node in (*of_scores, *of_mask)]
    known = all(isinstance(value, (Tensor, torch.SymInt)) for _, value in held)
    if not known or any(node.op == "get_attr" for function in functions for node in function.graph.nodes):
        return {}
    tensors, numbers, are_tensors = [], [], [isinstance(value, Tensor) for _, value in held]
    for (proxy, value), is_tensor in zip(held, are_tensors):
        if is_tensor:
            detached = output.create_proxy("call_method", "detach", (proxy,), {})
            tensors.append(wrap_fx_proxy(tracer, detached))
        else:
            numbers.append(SymNodeVariable(proxy, value))
    code = "".join(function.code for function in functions)
    name = hashlib.sha256(f"{code}{are_tensors}".encode()).hexdigest()
    score_mod, mask_mod = (_bare(function) for function in functions)
    _known[name] = _Functions(score_mod, mask_mod, tuple(are_tensors), len(of_scores))
    return {
        "functions": ConstantVariable.create(name),
        "tensors": ListVariable(tensors),
        "numbers": ListVariable(numbers),
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
    owner = operators.owner_of(layer)
    if owner is None:
        return

    def build() -> AttentionCall:
        known = _known.get(functions)
        if known is None:
            raise Unmeasurable(f"a compiled graph calls it with {_UNREAD}")
        score_mod, mask_mod = known.bound(tensors, numbers)
        block_mask = None
        if blocks:
            block_mask = flex.BlockMask.from_kv_blocks(
                *blocks,
                seq_lengths=tuple(sizes[:2]),
                BLOCK_SIZE=tuple(sizes[2:]),
                mask_mod=mask_mod,
                compute_q_blocks=False,
            )
        options = {"compiled": True, "scale": scale, "sinks": sinks}
        return described(interceptor, query, key, value, score_mod, block_mask, **options)

    with _vmap_works():
        operators.measure(owner, build)


def _vmap_works() -> AbstractContextManager:
    """Functions over the scores are evaluated by vmap, which graphs of the default backend leave out of operators."""
    leaving_out = torch._C._dispatch_tls_local_exclude_set()
    for name in ("FuncTorchBatched", "FuncTorchDynamicLayerFrontMode", "FuncTorchDynamicLayerBackMode"):
        leaving_out -= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), leaving_out)


_operator = operators.operator(
    "observe_flex",
    "Tensor query, Tensor key, Tensor value, Tensor[] blocks, SymInt[] sizes, str functions, Tensor[] tensors, "
    "SymInt[] numbers, float? scale, Tensor? sinks, str interceptor",
    _measure,
)
