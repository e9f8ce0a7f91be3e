"""Finding a layer's query and key weights, and proving that they are what they are taken for."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from ..compat import own_parameter
from ..names import named_modules
from . import known_classes, orders, trial
from .projections import Projections, Reader
from .shards import Spread

QK_NORM = re.compile(r"(^|_)(q|k|qk|query|key)(_|$)")


def find(
    model: nn.Module, layer: str, num_heads: int, *, scaling: bool = True, own: bool = False
) -> Projections:
    """The query and key projections of the attention layer with that name.

    They are looked for in the module and, if it has none, in the one around it.
    scaling: the weights are to be scaled. It has to be proved then that the scores of each head, and nothing else,
        follow them: by the module's class where that is known, else by a trial of the module. In either case the
        lengths of a copy's queries and keys have to be those at its projections, where these can be seen. Sharded
        weights are found too, as factors in place of values.
    own: `num_heads` is of this process alone, where tensor parallelism splits the heads; what is found is so anyway.
    Raises ValueError if there is no such module, if its layout is not known for certain, if its weights are not
    there (meta device), and for weights to be scaled that are frozen, shared with others or wrapped.
    """
    modules = dict(named_modules(model))
    module = _attention_module(modules, layer)
    around = modules[layer.rpartition(".")[0]]
    for name, place in ((layer, module), (layer.rpartition(".")[0], around)):
        if not orders.candidates(place, num_heads):
            continue
        spread = Spread.of(modules, name) if scaling else None
        if spread is not None and not own:
            num_heads = len(range(num_heads)[spread.part.of(num_heads)])
        candidates = orders.candidates(place, num_heads)
        if not scaling or known_classes.includes(place):
            candidates = candidates[:1]
        reasons: list[ValueError] = []
        for number, read in enumerate(candidates):
            try:
                found = read(Reader(layer, spread, changing=scaling))
                if spread is not None:
                    _prove(model, place, layer, found, number, spread)
                return found
            except ValueError as reason:
                reasons.append(reason.with_traceback(None))
        declared = orders.declared_heads(place)
        if (spread is None or spread.part.count == 1) and declared not in (
            None,
            num_heads,
        ):  # what it refuses is likely the number of heads
            raise ValueError(
                f"expected {declared} heads in layer {layer!r} (one number per head), got {num_heads}"
            ) from reasons[0]
        raise reasons[0]
    raise ValueError(
        f"expected layer {layer!r} to hold query and key projections in a known layout (q_proj/k_proj, "
        f"query/key, c_attn, qkv, in_proj_weight, ...), got {type(module).__name__} with "
        f"{[name for name, _ in module.named_children()]}"
    )


def _attention_module(modules: Mapping[str, nn.Module], layer: str) -> nn.Module:
    if layer in modules:
        return modules[layer]
    if "#" in layer:
        raise ValueError(
            f"expected a module of its own for layer {layer!r}, got one call of a module that runs several times: "
            "its weights serve all of the calls"
        )
    known = [name for name in modules if "attn" in name.lower() or "attention" in name.lower()]
    raise ValueError(
        f"expected the name of a module of the model, got {layer!r}; attention-like names: {known[:6]}"
    )


def _prove(
    model: nn.Module, place: nn.Module, layer: str, found: Projections, number: int, spread: Spread
) -> None:
    """Raise ValueError unless scaling these weights is proved to scale the scores of this layer, and nothing else.

    number: of the candidate that they were read by. spread: how the weights of `place` lie over processes.
    """
    _refuse_shared(model, layer, found)
    if not found.rest:  # latent attention has norms before these projections
        _refuse_qk_norm(place, layer)
    known = known_classes.includes(place)
    if known and own_parameter(place, "q_bias") is not None:  # VideoMAE in transformers 4
        raise ValueError(
            f"expected the biases of layer {layer!r} in its projections, got a q_bias beside them"
        )
    heads = found.num_heads

    def read(tried: nn.Module) -> Projections:
        return _read(tried, layer, heads, number)

    if known:
        reason = trial.known_disproof(model, place, heads, read, spread)
    else:
        reason = trial.disproof(model, place, (heads, number), read, spread)
    if reason is not None:
        raise ValueError(
            f"expected proof that the scores of layer {layer!r} follow the weights that are named like its query "
            f"and key projections, got none: {reason}"
        )


def _read(tried: nn.Module, layer: str, num_heads: int, number: int) -> Projections:
    return orders.candidates(tried, num_heads)[number](Reader(layer, changing=True))


def _refuse_shared(model: nn.Module, layer: str, found: Projections) -> None:
    """Raise ValueError if a weight is both a query and a key weight, or if another module of the model uses it."""
    mine = {id(parameter) for parameter in found.parameters}
    twice = len(mine) < len(found.parameters)
    modules = list(model.modules())
    holders = [m for m in modules if any(id(p) in mine for p in m.parameters(recurse=False))]
    names = {id(holder) for holder in holders}
    users = sum(id(child) in names for module in modules for child in module.children())
    held = sum(id(p) in mine for holder in holders for p in holder.parameters(recurse=False))
    if twice or held > len(mine) or users > len(holders):
        raise ValueError(
            f"expected layer {layer!r} to have query and key weights of its own, got some that "
            f"{'are both' if twice else 'other modules use too'}: scaling them would change more than its scores"
        )


def _refuse_qk_norm(module: nn.Module, layer: str) -> None:
    norms = [
        name
        for name, child in module.named_children()
        if QK_NORM.search(name) and ("norm" in name or "ln" in name) and not isinstance(child, nn.Identity)
    ]
    if own_parameter(module, "logit_scale") is not None:  # cosine attention normalises without a module
        norms.append("logit_scale")
    if norms:
        raise ValueError(
            f"expected scores that follow the query and key weights, got QK-norm in layer {layer!r} "
            f"({', '.join(norms)}): it undoes any scaling of them; lower its gains or the learning rate"
        )
