"""Attention that this project computes inside a model, with its statistics from the same pass.

The modules of `hnf_attention.nn` and the attention functions of `hnf_attention.integrations` call `attend`. It hands
each call and its statistics to the observer of the module that runs. No function is replaced for that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function

from .. import compat
from ..engine import weighted
from ..engine.call import Call, prepare
from ..engine.run import run
from ..statistics.rows import RowStats
from ..tracing import functional as in_functional
from ..tracing import traced, transformed
from . import observer, treating
from .call import COMPILED, AttentionCall, hidden, hide, is_plain, require_plain
from .compiled import layers, operators, slots, tracer
from .expected import Plain
from .interceptors import context_parallel, sdpa

OWN_PASS = "the module computes its statistics with its output"

#: What gets the statistics of a call: None where there are none.
Keep = Callable[[RowStats | None], None]
#: Computes the output of a checked call with this dropout.
Compute = Callable[[Call, float], Tensor]


class Extra(NamedTuple):
    """What shapes the scores of a call that scaled_dot_product_attention has no argument for; as in `attention`.

    interceptor: what the coverage report calls the call.
    """

    window_size: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    interceptor: str = "hnf_attention.nn"

    @property
    def plain(self) -> bool:
        """Whether scaled_dot_product_attention computes such calls, too."""
        return self.window_size is None and self.softcap is None and self.sinks is None


class Given(NamedTuple):
    """The arguments of a call that scaled_dot_product_attention has, too; tensors as in `attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = True

    @property
    def odd(self) -> bool:
        """Whether some tensor is a distributed, nested or other one that our kernels do not take."""
        return not all(map(is_plain, (self.query, self.key, self.value)))


def attend(given: Given, extra: Extra, keep: Keep, module: nn.Module | None = None) -> Tensor:
    """The attention output (B, H, M, D_v) of a call; its statistics go to `keep` and to the observer of the module.

    keep: gets the `RowStats` of the call before dropout, outside autograd. It gets None in a transform of torch.func
        and for tensors that cannot be measured, and nothing in the second forward of a checkpoint.
    module: whose call it is, None for the innermost that runs.

    Changes that interventions put on the module's calls are made first. Without dropout, output and statistics are of
    one pass. Raises ValueError or TypeError as `attention` does.
    """
    keep = _once(keep)
    keep(None)  # a change may compute the call by something else
    if not (treating.thread.running or treating.finders):
        return _attend(given, extra, keep, module, None)
    changed = treating.current(given.query, given.key)
    if changed is None:
        return _attend(given, extra, keep, module, None)

    def own(*args: Any, **named: Any) -> Tensor:
        return _attend(Given(*args, **named), extra, keep, module, None)

    rest = given._asdict()
    tensors = [rest.pop(name) for name in ("query", "key", "value")]
    return changed.run(own, extra.plain, *tensors, **rest)


def attend_with_weights(
    given: Given, extra: Extra, keep: Keep, module: nn.Module | None = None
) -> tuple[Tensor, Tensor]:
    """As `attend`, and the weights (B, H, M, N) after dropout. Plain PyTorch computes both; no change is made."""
    weights: list[Tensor] = []

    def compute(call: Call, dropout_p: float) -> Tensor:
        out, found = weighted.attend(call, dropout_p)
        weights.append(found)
        return out

    keep = _once(keep)
    keep(None)
    out = _attend(given, extra, keep, module, compute)
    return out, weights[-1]


def _once(keep: Keep) -> Keep:
    """The same, but nothing in a backward: there, a checkpoint runs its forward a second time."""
    return keep if traced() or compat.running_backward() == -1 else _forget


def _forget(_: RowStats | None) -> None:
    pass


def _attend(
    given: Given, extra: Extra, keep: Keep, module: nn.Module | None, compute: Compute | None
) -> Tensor:
    """One call, changed or not. compute: makes the output in place of the engine."""
    given = given._replace(attn_mask=_with_hidden_keys(given.attn_mask, given.query.dtype))
    if traced():
        return _attend_traced(given, extra, keep, compute)
    rings = context_parallel.is_wrapper(functional.scaled_dot_product_attention)
    if compute is None and extra.plain and (given.odd or rings):
        # The interceptor of this function knows which of these can be measured.
        return _by_pytorch(given)
    if rings:
        raise RuntimeError(
            "expected attention without weights, window, soft-cap and sinks inside context_parallel, whose ring knows "
            f"none of these, got some in {extra.interceptor}"
        )
    find = None if module is None else partial(_owner_of, module)
    if transformed():
        observer.list_transformed(find)
        return _computed(given, extra, compute)[0]
    if not has_torch_function(given[:3]):
        return _attend_observed(given, extra, keep, find, compute)

    # Modes of torch.overrides, such as the trial of an intervention, know attention by this name.
    def scaled_dot_product_attention(
        query: Tensor, key: Tensor, value: Tensor, *, enable_gqa: bool
    ) -> Tensor:
        changed = given._replace(query=query, key=key, value=value)
        return _attend_observed(changed, extra, keep, find, compute)

    return handle_torch_function(scaled_dot_product_attention, given[:3], *given[:3], enable_gqa=True)


def _attend_observed(
    given: Given, extra: Extra, keep: Keep, find: Callable[..., Any] | None, compute: Compute | None
) -> Tensor:
    found: list[RowStats | None] = []

    def original(*tensors: Tensor) -> Tensor:
        out, rows = _computed(given, extra, compute)
        found.append(rows)
        return out

    def describe(*tensors: Tensor) -> AttentionCall:
        require_plain(query=given.query, key=given.key, value=given.value, attn_mask=given.attn_mask)
        call = _described(given, extra)
        call.own_rows = lambda: found[-1] if found else None
        return call

    def plain_of(*tensors: Tensor) -> Plain | None:
        if given.attn_mask is not None or extra.sinks is not None or given.odd:
            return None
        return Plain(*given[:3], (given.is_causal, given.scale, *extra))

    out = observer.run(original, given[:3], {}, describe, find, plain_of)
    keep(found[-1])
    return out


def _attend_traced(given: Given, extra: Extra, keep: Keep, compute: Compute | None) -> Tensor:
    """One call that Dynamo traces: its output and statistics are results of the graph."""
    out, rows = tracer.announced(None, _computed, (given, extra, compute), {})
    if rows is not None and not in_functional():
        _beside(given, extra, out, rows)
        keep(rows)
    return out


def _computed(given: Given, extra: Extra, compute: Compute | None) -> tuple[Tensor, RowStats | None]:
    """The output of a call and its statistics, if its tensors have any. Raises as `attention` does."""
    query, key, value, attn_mask, dropout_p, is_causal, scale, _ = given
    call = prepare(
        query,
        key,
        value,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        window_size=extra.window_size,
        softcap=extra.softcap,
        sinks=extra.sinks,
        seqlens=None,
        extended=False,
    )
    # Dynamo cannot trace the question which kernels the user allows.
    left = dropout_p > 0 or (extra.plain and not traced() and sdpa.fused_kernels_off() is not None)
    if compute is None and not left and not given.odd:
        return run(call, detached=True)  # type: ignore[return-value]  # a call with a value has an output
    rows = None
    if not given.odd:
        with torch.no_grad():
            rows = run(call._replace(value=None), detached=True)[1]
    if compute is not None:
        return compute(call, dropout_p), rows
    if extra.plain and not (is_causal and attn_mask is not None):
        cast = given._replace(query=call.query, key=call.key, attn_mask=call.options.attn_mask)
        return _by_pytorch(cast._replace(value=value if call.value is None else call.value)), rows
    return weighted.attend(call, dropout_p)[0], rows


def _by_pytorch(given: Given) -> Tensor:
    query, key, value, attn_mask, dropout_p, is_causal, scale, grouped = given
    grouped = grouped and query.dim() > 2 and query.shape[-3] != key.shape[-3]
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=grouped
    )


def _with_hidden_keys(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask with -inf in place of numbers that models hide a key with."""
    if mask is None or not mask.is_floating_point():
        return mask
    if transformed() or mask.requires_grad:
        return hidden(mask, dtype)
    return hide(mask, dtype)


def _owner_of(module: nn.Module, *_: Any, **__: Any) -> observer.Owner | None:
    return observer.owner(module)


def _described(given: Given, extra: Extra) -> AttentionCall:
    sinks = extra.sinks
    return AttentionCall(
        query=given.query,
        key=given.key,
        value=given.value,
        attn_mask=operators.detached(given.attn_mask),
        is_causal=given.is_causal,
        scale=given.scale,
        window_size=extra.window_size,
        softcap=extra.softcap,
        sinks=None if sinks is None else sinks.detach(),
        interceptor=extra.interceptor,
        from_output=lambda out: out,
        not_fused=OWN_PASS,
        probe_preferred=None,
        output_of=lambda out: out,
    )


def _beside(given: Given, extra: Extra, out: Tensor, rows: RowStats) -> None:
    """Leave an operator in the graph that hands the call over. To be traced."""
    mask, scale = given.attn_mask, given.scale
    layer, _ = tracer.find_layer(*given[:3], mask, numbers=(scale,), into_slot=extra.plain)
    if layer is None:
        return
    query, key, value = operators.inputs(*given[:3])
    mask, out = operators.detached(mask), out.detach()
    if isinstance(layer, slots.Slot):
        state = layer.accumulator, layer.result, layer.token, layer.control
        sdpa.graphed_operator(*state, query, key, value, out, mask, given.is_causal, scale, True, None)
        return
    core = [rows.lse, rows.entropy, rows.max_logit, rows.min_logit]
    sinks = operators.detached(extra.sinks)
    numbers = scale, extra.window_size, extra.softcap
    _operator(layer, query, key, value, out, mask, sinks, core, given.is_causal, *numbers, extra.interceptor)


def _measure(
    layer: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    rows: list[Tensor],
    is_causal: bool,
    scale: float | None,
    window_size: int | None,
    softcap: float | None,
    interceptor: str,
) -> None:
    """What the operator does when its graph runs."""
    owner = layers.owner_of(layer)
    if owner is None:
        return

    def described() -> AttentionCall:
        given = Given(query, key, value, attn_mask, 0.0, is_causal, scale)
        call = _described(given, Extra(window_size, softcap, sinks, interceptor))
        call.place, call.own_rows = COMPILED, lambda: RowStats(*rows)
        return call

    owner.observer.attend(owner.layer, described, lambda: out)


_operator = operators.operator(
    "hand_over",
    "Tensor query, Tensor key, Tensor value, Tensor out, Tensor? attn_mask, Tensor? sinks, Tensor[] rows, "
    "bool is_causal, float? scale, SymInt? window_size, float? softcap, str interceptor",
    _measure,
)
