"""Catches the attention functions of Hugging Face transformers.

A model looks its attention function up under the name in `config._attn_implementation`. By that name it also chooses
how masks are built (AttentionMaskInterface), and many model files choose code by comparing it with "sdpa" or "eager"
(sparse indexers, cache tricks, `output_attentions`). A function under a name of its own would lose padding and sliding
windows, and change that code silently. So every name stays, and the functions *behind* the names are replaced.

- "sdpa": the entry of AttentionInterface. It announces the module and its heads. Its call of
  scaled_dot_product_attention is measured there, with the mask and options that this version of transformers makes.
- "flex_attention": likewise the entry, described from its keywords, from which transformers makes a score_mod.
- "eager": the function of the model's own file, a global of that file. It is described from its keywords. Once per
  layer, the description is compared with what the function computes.
"""

from __future__ import annotations

import functools
import inspect
import operator
import weakref
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from ... import compat
from ...tracing import traced, transformed
from .. import observer, treating
from ..call import AttentionCall, Unmeasurable, hide, require_plain, why_not_fused
from ..compiled import flex as flex_compiled
from ..compiled import layers, operators, tracer
from ..equivalence import check_equivalence
from ..flex_call import described
from ..patches import Patch, methods, of_item

EAGER = "eager_attention_forward"  # or a name that ends so
FLEX_INTERCEPTOR = "transformers flex_attention"
_TENSORS = ("query", "key", "value")
EAGER_STAYS = 'mode="auto" leaves eager attention as it is'


def install(modules: Iterable[nn.Module]) -> list[Patch]:
    """Replace the entries of AttentionInterface, and eager functions in the files of these modules, until released."""
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
    for namespace, name in _eager_functions({type(module) for module in modules}):
        patches.append(Patch.acquire(*of_item(namespace, name), _eager_interceptor))
    return patches


def _eager_functions(classes: set[type]) -> list[tuple[dict[str, Any], str]]:
    """The globals that methods of these classes use as eager attention: (namespace, name), each once."""
    found: dict[tuple[int, str], tuple[dict[str, Any], str]] = {}
    for method in {method for cls in classes for method in methods(cls)}:
        for name in method.__code__.co_names:
            if name.endswith(EAGER) and isinstance(method.__globals__.get(name), FunctionType):
                found[id(method.__globals__), name] = (method.__globals__, name)
    return list(found.values())


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], index: int, name: str) -> Any:
    return args[index] if len(args) > index else kwargs[name]


def _heads(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """How many heads queries and keys have."""
    return _argument(args, kwargs, 1, "query").shape[1], _argument(args, kwargs, 2, "key").shape[1]


def _owner(module: nn.Module, *_: Any, **__: Any) -> observer.Owner | None:
    return observer.owner(module)


def _sdpa_interceptor(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def sdpa_attention_forward(*args: Any, **kwargs: Any) -> Any:
        if transformed():
            if traced():
                return tracer.announced(_heads(args, kwargs), original, args, kwargs)
            return original(*args, **kwargs)
        heads: observer.Heads | None = None
        try:
            owner = observer.wanting_owner(_owner, *args, **kwargs)
            if owner is not None:
                heads = observer.Heads(owner, *_heads(args, kwargs))
        except Exception as error:  # the monitor never ends a run
            observer.note_fault(error)
        if heads is None:
            return original(*args, **kwargs)
        thread = observer.thread
        before, thread.heads = thread.heads, heads
        try:
            return original(*args, **kwargs)
        finally:
            thread.heads = before

    return sdpa_attention_forward


def _perhaps_changed(attend: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`attend` of (module, query, key, value, ...), or of what somebody changes the queries and keys to."""
    if not (treating.thread.running or treating.finders):
        return attend(*args, **kwargs)
    module, *tensors = (_argument(args, kwargs, i, name) for i, name in enumerate(("module", *_TENSORS)))
    changed = treating.current(*tensors[:2])
    if changed is None:
        return attend(*args, **kwargs)
    rest = {name: value for name, value in kwargs.items() if name not in ("module", *_TENSORS)}
    return changed.run(functools.partial(attend, module), False, *tensors, *args[4:], **rest)


def _eager_interceptor(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)
    names, label = tuple(signature.parameters), f"{original.__module__}.{original.__name__}"
    _functions[label] = original
    describe = functools.partial(_bound_call, original, signature)

    @functools.wraps(original)
    def eager_attention_forward(*args: Any, **kwargs: Any) -> Any:
        return _perhaps_changed(attend, args, kwargs)

    def attend(*args: Any, **kwargs: Any) -> Any:
        if transformed():
            if traced():
                _beside_eager(label, names, dict(zip(names, args)) | kwargs)
                return tracer.announced(None, original, args, kwargs)
            observer.list_transformed(_owner, *args, **kwargs)
            return original(*args, **kwargs)
        return observer.run(original, args, kwargs, describe, _owner)

    return eager_attention_forward


def _beside_eager(label: str, names: tuple[str, ...], given: dict[str, Any]) -> None:
    """Leave the operator in the graph. To be traced. names: the function's parameters."""
    query, key, value, mask = (given.get(name) for name in names[1:5])
    bias, sinks = given.get("position_bias"), given.get("s_aux")
    numbers = given.get("scaling"), given.get("softcap")
    layer, _ = tracer.find_layer(query, key, value, mask, bias, sinks, numbers=numbers)
    if layer is not None and query is not None and key is not None and value is not None:
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
    owner = layers.owner_of(layer)
    if owner is None:
        return
    original = _functions[label]
    parameters = inspect.signature(original).parameters
    given = {"position_bias": bias, "s_aux": sinks, "scaling": scaling, "softcap": softcap}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
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
    module, query, key, value, mask = bound.args[:5]
    return _eager_call(original, signature.parameters, module, query, key, value, mask, options)


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

    Every such function takes (module, query, key, value, attention_mask, scaling, dropout, **ignored) and adds the mask
    to the scores. It applies `position_bias` and `softcap` if they are among its parameters. It ignores `is_causal` and
    `sliding_window`: the mask carries both.
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
        probe_preferred=EAGER_STAYS,
        output_of=lambda result: result[0].transpose(1, 2),
        check=functools.partial(check_equivalence, original, module, mask, options),
    )


def _flex_interceptor(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def flex_attention_forward(*args: Any, **kwargs: Any) -> Any:
        return _perhaps_changed(attend, args, kwargs)

    def attend(*args: Any, **kwargs: Any) -> Any:
        if transformed():
            if traced():
                result = tracer.announced(None, original, args, kwargs)
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
    """Leave the operator in the graph. To be traced. The traced score_mod holds all that is added to scores."""
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
    """What transformers' flex_attention computes: the soft-cap comes first, then the mask and the bias are added."""
    if head_mask is not None:
        raise Unmeasurable("a head_mask was given")
    mask = block_mask = None
    if isinstance(attention_mask, BlockMask):
        block_mask = attention_mask
    else:
        mask = attention_mask
    require_plain(query=query, key=key, attention_mask=mask, position_bias=position_bias)
    if mask is not None:
        mask = mask[:, :1].to(query.dtype)  # of one head; a boolean one is added too
    call = described(
        FLEX_INTERCEPTOR,
        query,
        key,
        value,
        block_mask=block_mask,
        compiled=True,
        scale=scaling,
        sinks=s_aux,
        attn_mask=_combined(mask, position_bias, query, key),
        softcap=softcap,
    )
    call.output_of = lambda result: result[0].transpose(1, 2)
    return call


def _dropout(module: nn.Module, options: dict[str, Any]) -> float:
    """The dropout probability in force. A function without such an option may take it from the module."""
    if not module.training:
        return 0.0
    own = (child.p for child in module.modules() if isinstance(child, nn.Dropout))
    return options["dropout"] if "dropout" in options else max(own, default=0.0)


@torch.no_grad()
def _combined(mask: Tensor | None, bias: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """One additive mask from both. A mask that was made for a longer cache is cut to the keys there are."""
    masks = [hide(x.detach()[..., : key.shape[2]], query.dtype) for x in (mask, bias) if x is not None]
    return functools.reduce(operator.add, masks) if masks else None


def _weights_wanted(module: nn.Module, options: dict[str, Any]) -> bool:
    """Whether the model's caller may want attention weights, which our attention does not compute."""
    config = getattr(module, "config", None)
    asked = options.get("output_attentions") or getattr(config, "output_attentions", False)
    return bool(asked) or compat.collects_attention_weights()
