"""Where a layer keeps its query and key weights, one block per head, in the layouts that models use."""

from __future__ import annotations

import re
from dataclasses import replace

from torch import nn

from ..compat import child, own_parameter
from .projections import Projections, linear_rows, parameter_rows
from .shards import Shards

SEPARATE = (
    ("q_proj", "k_proj"),  # LLaMA, Mistral, Gemma, OPT, BART, Whisper, CLIP
    ("query", "key"),  # BERT, ViT
    ("q_lin", "k_lin"),  # DistilBERT
    ("q", "k"),  # T5
    ("wq", "wk"),  # Meta's LLaMA code
    ("to_q", "to_k"),  # diffusers
)
# Rows ordered all of q, all of k, all of v; each of those by heads.
FUSED = ("c_attn", "qkv", "Wqkv", "qkv_proj")
# Rows ordered by heads, and q, k, v within each head. The name alone does not tell; these classes do so.
INTERLEAVED = {"query_key_value": ("GPTNeoXAttention", "BloomAttention")}
# Classes that use a FUSED name for another order of rows.
NOT_FUSED = ("GPTBigCodeAttention", "CodeGenAttention", "MiniMaxLightningAttention")
QK_NORM = re.compile(r"(^|_)(q|k|qk|query|key)(_|$)")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")


def find(model: nn.Module, layer: str, num_heads: int, *, scaling: bool = True) -> Projections:
    """The query and key projections of the attention layer with that name.

    They are looked for in the module and, if it has none, in the one around it.
    scaling: the weights are to be scaled. This refuses layers with QK-norm, whose scores do not follow their weights.
        It finds sharded weights too, as factors in place of values.
    Raises ValueError if there is no such module, if its layout is not known for certain, or if its weights
    are not there (meta device).
    """
    try:
        module = model.get_submodule(layer)
    except AttributeError:
        known = [
            name for name, _ in model.named_modules() if "attn" in name.lower() or "attention" in name.lower()
        ]
        raise ValueError(
            f"expected the name of a module of the model, got {layer!r}; attention-like names: {known[:6]}"
        ) from None
    around = model.get_submodule(layer.rpartition(".")[0])
    shards = Shards.of(model, layer) if scaling else None
    for place in (module, around):
        found = _in_module(place, layer, num_heads, shards)
        if found is not None:
            if any(part.is_meta for part in (*found.query, *found.key)):
                raise ValueError(
                    f"expected layer {layer!r} to hold its query and key weights, got some on the meta device "
                    "(an offloaded model keeps them elsewhere and brings them here for a forward only)"
                )
            if scaling:
                _refuse_qk_norm(place, layer)
            return replace(found, shards=shards)
    raise ValueError(
        f"expected layer {layer!r} to hold query and key projections in a known layout (q_proj/k_proj, "
        f"query/key, c_attn, qkv, in_proj_weight, ...), got {type(module).__name__} with "
        f"{[name for name, _ in module.named_children()]}"
    )


def holds(module: nn.Module) -> bool:
    """Whether a module has children named like query and key projections, in a layout known to `find` or not."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    names = {name for name, child in module.named_children()}
    return any({q, k} <= names for q, k in SEPARATE) or bool(names & {*FUSED, *INTERLEAVED})


def _in_module(module: nn.Module, layer: str, num_heads: int, shards: Shards | None) -> Projections | None:
    if isinstance(module, nn.MultiheadAttention):
        return _multihead(module, layer, num_heads, shards)
    for query, key in SEPARATE:
        if _is_module(module, query) and _is_module(module, key):
            return _separate(module, layer, num_heads, query, key, shards)
    for name, classes in INTERLEAVED.items():
        if _is_module(module, name):
            return _interleaved(module, layer, num_heads, name, classes, shards)
    for name in FUSED:
        if _is_module(module, name):
            return _fused(module, layer, num_heads, name, shards)
    return None


def _separate(
    module: nn.Module, layer: str, num_heads: int, query: str, key: str, shards: Shards | None
) -> Projections:
    query_rows, key_rows = (linear_rows(module, layer, name, shards) for name in (query, key))
    size = _head_size(layer, len(query_rows[0]), num_heads)
    declared = getattr(module, "head_dim", size)
    key_heads, left = divmod(len(key_rows[0]), size)
    if declared != size or left or not key_heads or num_heads % key_heads:
        raise ValueError(
            f"expected {num_heads} query heads of {declared} and key heads of that size in layer {layer!r}, "
            f"got {query} with {len(query_rows[0])} and {key} with {len(key_rows[0])} outputs"
        )
    return Projections.by_head(query_rows, key_rows, num_heads, key_heads)


def _fused(module: nn.Module, layer: str, num_heads: int, name: str, shards: Shards | None) -> Projections:
    if _class_name(module) in NOT_FUSED:
        raise ValueError(
            f"expected query, key and value rows one after the other in {layer}.{name}, "
            f"got another order, that of {_class_name(module)}"
        )
    fused = linear_rows(module, layer, name, shards)
    if name == "c_attn" and _is_module(module, "q_attn"):  # GPT-2's cross attention: c_attn is k and v
        query_rows = linear_rows(module, layer, "q_attn", shards)
        size = _head_size(layer, len(query_rows[0]), num_heads)
        key_heads, start, expected = num_heads, 0, 2 * num_heads * size
    else:
        key_heads = _key_heads(module, num_heads)
        size = _head_size(layer, len(fused[0]), num_heads + 2 * key_heads)
        start, expected = num_heads * size, (num_heads + 2 * key_heads) * size
        query_rows = [rows[:start] for rows in fused]
    if len(fused[0]) != expected or getattr(module, "head_dim", size) != size:
        raise ValueError(
            f"expected {expected} outputs (heads of {getattr(module, 'head_dim', size)}) of {layer}.{name}, "
            f"got {len(fused[0])}"
        )
    stop = start + key_heads * size
    return Projections.by_head(query_rows, [rows[start:stop] for rows in fused], num_heads, key_heads)


def _interleaved(
    module: nn.Module, layer: str, num_heads: int, name: str, classes: tuple[str, ...], shards: Shards | None
) -> Projections:
    if _class_name(module) not in classes:
        raise ValueError(
            f"expected {layer}.{name} in a class whose row order is known {classes}, "
            f"got {_class_name(module)}"
        )
    rows = linear_rows(module, layer, name, shards)
    _head_size(layer, len(rows[0]), 3 * num_heads)
    parts = [part.unflatten(0, (num_heads, 3, -1)) for part in rows]
    return Projections([p[:, 0] for p in parts], [p[:, 1] for p in parts], num_heads, num_heads)


def _multihead(
    module: nn.MultiheadAttention, layer: str, num_heads: int, shards: Shards | None
) -> Projections:
    if module.num_heads != num_heads:
        raise ValueError(f"expected {module.num_heads} heads for layer {layer!r}, got {num_heads}")
    width = module.embed_dim
    if module.in_proj_weight is not None:
        fused = parameter_rows(module.in_proj_weight, layer, shards)
        query, key = [fused[:width]], [fused[width : 2 * width]]
    else:
        weights = (module.q_proj_weight, module.k_proj_weight)
        query, key = ([parameter_rows(weight, layer, shards)] for weight in weights)
    if module.in_proj_bias is not None:
        bias = parameter_rows(module.in_proj_bias, layer, shards)
        query.append(bias[:width])
        key.append(bias[width : 2 * width])
    if module.bias_k is not None:
        key.append(parameter_rows(module.bias_k, layer, shards, dim=2).view(-1))
    return Projections.by_head(query, key, num_heads, num_heads)


def _class_name(module: nn.Module) -> str:
    """The class that the model's author wrote: FSDP2 puts one of its own in front, for the same code."""
    first, *others = type(module).__mro__
    if others[0].__name__ == "FSDPModule":
        first = others[1]
    return first.__name__


def _head_size(layer: str, rows: int, heads: int) -> int:
    if rows % heads:
        raise ValueError(
            f"expected layer {layer!r}, whose projections have {rows} rows, to have heads of one size, got {heads} "
            "heads of queries, keys and values together"
        )
    return rows // heads


def _key_heads(module: nn.Module, num_heads: int) -> int:
    for holder in (module, getattr(module, "config", None)):
        for name in KEY_HEADS:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return num_heads


def _is_module(module: nn.Module, name: str) -> bool:
    return child(module, name) is not None


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
