"""The second interceptor: attention functions of Hugging Face transformers.

A model looks its attention function up under the name in `config._attn_implementation`, and uses that
same name to choose how masks are built (AttentionMaskInterface), and, in many model files, to choose
code (sparse indexers, cache tricks, `output_attentions`) by comparing it with "sdpa" or "eager". A
function registered under a name of its own would lose padding and sliding windows, silently change
the second, and on models that do not support `set_attn_implementation` only cause a warning. So no
name is changed here: what lies *behind* the names is replaced.

- "sdpa": the entry of AttentionInterface. It announces the module and its heads, and the call that
  it makes to scaled_dot_product_attention is measured there, with the very mask and options that the
  library of whatever version derives from its keywords.
- "flex_attention": likewise the entry, described from its keywords, of which it makes its score_mod.
- "eager": the function of the model's own file, a global of that file. It is described from its
  keywords, and the description is checked once per layer against what the function computes.
"""

from __future__ import annotations

import functools
import inspect
import operator
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from ...engine import api
from ...tracing import traced, transformed
from .. import observer
from ..call import AttentionCall, Unmeasurable, hide, require_plain, why_not_fused
from ..compiled import flex as flex_compiled
from ..compiled import operators
from ..patches import Patch, methods
from .flex_call import described

EAGER = "eager_attention_forward"  # or a name that ends so
FLEX_INTERCEPTOR = "transformers flex_attention"
CHECKED_ROWS = 64


def install(modules: Iterable[nn.Module]) -> list[Patch]:
    """Put the interceptor in place, for "sdpa" everywhere and for "eager" in the files of these modules."""
    from transformers import AttentionInterface

    patches = [
        Patch.acquire(
            lambda: AttentionInterface()["sdpa"],
            functools.partial(AttentionInterface.register, "sdpa"),
            _sdpa_interceptor,
        ),
        Patch.acquire(
            lambda: AttentionInterface()["flex_attention"],
            functools.partial(AttentionInterface.register, "flex_attention"),
            _flex_interceptor,
        ),
    ]
    for place, name in _eager_functions({type(module) for module in modules}):
        read = functools.partial(operator.getitem, place, name)
        write = functools.partial(operator.setitem, place, name)
        patches.append(Patch.acquire(read, write, _eager_interceptor))
    return patches


def _eager_functions(classes: set[type]) -> list[tuple[dict[str, Any], str]]:
    """The globals that methods of these classes use as eager attention: (namespace, name), each once."""
    found: dict[tuple[int, str], tuple[dict[str, Any], str]] = {}
    for method in {method for cls in classes for method in methods(cls)}:
        for name in method.__code__.co_names:
            if name.endswith(EAGER) and isinstance(method.__globals__.get(name), FunctionType):
                found[id(method.__globals__), name] = (method.__globals__, name)
    return list(found.values())


def _argument(args: tuple, kwargs: dict[str, Any], index: int, name: str) -> Any:
    return args[index] if len(args) > index else kwargs[name]


def _heads(args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
    """Of queries and keys."""
    return _argument(args, kwargs, 1, "query").shape[1], _argument(args, kwargs, 2, "key").shape[1]


def _owner(module: nn.Module, *_: Any, **__: Any) -> observer.Owner | None:
    return observer.owner(module)


def _sdpa_interceptor(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def sdpa_attention_forward(*args: Any, **kwargs: Any) -> Any:
        if transformed():
            if traced():
                return operators.announced(_heads(args, kwargs), original, args, kwargs)
            return original(*args, **kwargs)
        owner = observer.measurer(_owner, *args, **kwargs)
        if owner is None:
            return original(*args, **kwargs)
        thread = observer.thread
        before, thread.heads = thread.heads, observer.Heads(owner, *_heads(args, kwargs))
        try:
            return original(*args, **kwargs)
        finally:
            thread.heads = before

    return sdpa_attention_forward


def _eager_interceptor(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)
    names, label = tuple(signature.parameters), f"{original.__module__}.{original.__name__}"
    _functions[label] = original
    describe = functools.partial(_bound_call, original, signature)

    @functools.wraps(original)
    def eager_attention_forward(*args: Any, **kwargs: Any) -> Any:
        if transformed():
            if traced():
                _beside_eager(label, names, dict(zip(names, args)) | kwargs)
                return operators.announced(None, original, args, kwargs)
            observer.list_transformed(_owner, *args, **kwargs)
            return original(*args, **kwargs)
        return observer.run(original, args, kwargs, describe, _owner)

    return eager_attention_forward


def _beside_eager(label: str, names: tuple[str, ...], given: dict[str, Any]) -> None:
    """Leave the operator in the graph; traced. names: the function's parameters."""
    query, key, value, mask = (given.get(name) for name in names[1:5])
    bias, sinks = given.get("position_bias"), given.get("s_aux")
    numbers = given.get("scaling"), given.get("softcap")
    layer, _ = operators.running(query, key, value, mask, bias, sinks, numbers=numbers)
    if layer is not None:
        query, key, value = operators.inputs(query, key, value)
        mask, bias, sinks = operators.detached(mask), operators.detached(bias), operators.detached(sinks)
        masked = given.get("head_mask") is not None
        _operator(layer, query, key, value, mask, bias, sinks, *numbers, masked, label)


def _measure(
    layer: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    head_mask: bool,
    label: str,
) -> None:
    """What the operator does when its graph runs."""
    owner = operators.owner_of(layer)
    if owner is None:
        return
    original = _functions[label]
    parameters = inspect.signature(original).parameters
    options = {"position_bias": bias, "s_aux": sinks, "scaling": scaling, "softcap": softcap}
    options = {name: value for name, value in options.items() if value is not None}
    if "dropout" in parameters:
        options["dropout"] = 0.0
    if head_mask:
        options["head_mask"] = head_mask
    call = (owner.module, query, key, value, mask)
    operators.measure(owner, functools.partial(_eager_call, original, parameters, *call, options))


#: Eager attention functions by the names that compiled graphs know them by.
_functions: weakref.WeakValueDictionary[str, Callable[..., Any]] = weakref.WeakValueDictionary()
_operator = operators.operator(
    "observe_eager",
    "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias, Tensor? sinks, float? scaling, "
    "float? softcap, bool head_mask, str label",
    _measure,
)


def _bound_call(
    original: Callable[..., Any], signature: inspect.Signature, *args: Any, **kwargs: Any
) -> AttentionCall:
    bound = signature.bind(*args, **kwargs)
    options = dict(list(bound.arguments.items())[5:])
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            options |= options.pop(parameter.name, {})
    return _eager_call(original, signature.parameters, *bound.args[:5], options)


def _eager_call(
    original: Callable[..., Any],
    parameters: Mapping[str, Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
) -> AttentionCall:
    """What an eager attention function computes, from its arguments; options: those after the first five.

    Every one of them has (module, query, key, value, attention_mask, scaling, dropout, **ignored), adds
    the mask to the scores, and `position_bias` and `softcap` where it declares them. It never applies
    `is_causal` or `sliding_window`: the mask carries both.
    """
    bias, softcap = (options.get(x) if x in parameters else None for x in ("position_bias", "softcap"))
    require_plain(query=query, key=key, value=value, attention_mask=mask, position_bias=bias)
    if options.get("head_mask") is not None:
        raise Unmeasurable("a head_mask was given")
    not_fused = why_not_fused(_dropout(module, options), mask, bias)
    if not_fused is None and _weights_wanted(module, options):
        not_fused = "attention weights may be asked for"
    return AttentionCall(
        query=query,
        key=key,
        value=value,
        attn_mask=_combined(mask, bias, query, key),
        is_causal=False,
        scale=options.get("scaling"),
        softcap=softcap,
        sinks=options.get("s_aux"),
        interceptor="transformers eager",
        from_output=lambda out: (out.transpose(1, 2).contiguous(), None),
        not_fused=not_fused,
        prefer_fused=False,
        check=functools.partial(_same_function, original, module, mask, options),
    )


def _flex_interceptor(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def flex_attention_forward(*args: Any, **kwargs: Any) -> Any:
        if transformed():
            if traced():
                result = operators.announced(None, original, args, kwargs)
                _beside_flex(*args, **kwargs)
                return result
            observer.list_transformed(_owner, *args, **kwargs)
            return original(*args, **kwargs)
        return observer.run(original, args, kwargs, _flex_call, _owner)

    return flex_attention_forward


def _beside_flex(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> None:
    """Leave the operator in the graph; traced. What is added to the scores is in the score_mod that was traced."""
    block_mask = attention_mask if isinstance(attention_mask, BlockMask) else None
    flex_compiled.beside(FLEX_INTERCEPTOR, query, key, value, block_mask, scaling, s_aux)


@torch.no_grad()
def _flex_call(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    head_mask: Tensor | None = None,  # of transformers 4
    **_: Any,
) -> AttentionCall:
    """What transformers' flex_attention computes: the soft-cap first, then the mask and the bias are added."""
    if head_mask is not None:
        raise Unmeasurable("a head_mask was given")
    mask, block_mask = attention_mask, None
    if isinstance(mask, BlockMask):
        mask, block_mask = None, mask
    require_plain(query=query, key=key, attention_mask=mask, position_bias=position_bias)
    if mask is not None:
        mask = mask[:, :1].to(query.dtype)  # one head's, and added even where it is boolean
    mask = _combined(mask, position_bias, query, key)
    options = {"scale": scaling, "sinks": s_aux, "softcap": softcap, "attn_mask": mask}
    return described(FLEX_INTERCEPTOR, query, key, value, None, block_mask, compiled=True, **options)


def _dropout(module: nn.Module, options: dict[str, Any]) -> float:
    """The probability in force; a function that is not told it may take it from the module."""
    if not module.training:
        return 0.0
    own = (child.p for child in module.modules() if isinstance(child, nn.Dropout))
    return options["dropout"] if "dropout" in options else max(own, default=0.0)


@torch.no_grad()
def _combined(mask: Tensor | None, bias: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """One additive mask from both; a mask for a longer cache is cut to the keys there are."""
    masks = [hide(x.detach()[..., : key.shape[2]], query.dtype) for x in (mask, bias) if x is not None]
    return functools.reduce(operator.add, masks) if masks else None


def _weights_wanted(module: nn.Module, options: dict[str, Any]) -> bool:
    """Whether the caller of the model asked for attention weights, which fused attention has not."""
    config = getattr(module, "config", None)
    if options.get("output_attentions") or getattr(config, "output_attentions", False):
        return True
    capturing = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(capturing, "_active_collector", None)
    if collector is None:  # transformers 4 does not tell its attention functions
        return True
    return any("attentions" in kind for kind in collector.get() or ())


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Without the dropout of the module itself, which would also draw from the model's random numbers."""
    modes = {child: child.training for child in module.modules()}
    try:
        for child in modes:
            child.training = False
        yield
    finally:
        for child, training in modes.items():
            child.training = training


@torch.no_grad()
def _same_function(
    original: Callable[..., Any],
    module: nn.Module,
    mask: Tensor | None,
    options: dict[str, Any],
    call: AttentionCall,
) -> bool:
    """Compare what `original` computes with what `call` says, on the last rows of the first sequence.

    In double precision, so that no rounding is mistaken for a difference. True when they agree, False
    when there is nothing finite to compare; raises Unmeasurable when they differ.
    """
    wide = torch.float32 if call.query.device.type == "mps" else torch.float64

    def part(x: Tensor | None, of_rows: bool = True) -> Tensor | None:
        if x is None:
            return None
        x = x[:1, :, -CHECKED_ROWS:] if of_rows and x.shape[2] > 1 else x[:1]
        return x.to(wide) if x.is_floating_point() else x

    query, key, value = part(call.query), part(call.key, False), part(call.value, False)
    options = dict(options)
    if "dropout" in options:
        options["dropout"] = 0.0
    if "position_bias" in options:
        options["position_bias"] = part(options["position_bias"])
    with torch.autocast(query.device.type, enabled=False), _evaluating(module):
        theirs = original(module, query, key, value, part(mask), **options)[0].transpose(1, 2)
        ours, stats = api.attention(
            query, key, value, **call.keywords() | {"attn_mask": part(call.attn_mask)}
        )
    occupied = stats.lse != -torch.inf
    if not occupied.any():
        return False
    difference = (theirs - ours).abs().amax(-1)[occupied].max()
    # A softmax in single precision moves a weight by its score's rounding.
    scores = torch.maximum(stats.max_logit.abs(), stats.min_logit.abs())[occupied].max()
    tolerance = 1e-5 * value.abs().max() * (1 + scores)
    if not (difference - tolerance).isfinite():
        return False
    if difference > tolerance:
        raise Unmeasurable(
            f"its eager attention function computes something else (outputs differ by {difference:.1e})",
            lasting=True,
        )
    return True
