"""Where a layer keeps its query and key weights, one block per head, in the layouts models use."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..compat import child, own_parameter
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
# Rows ordered by heads, each of them q, k, v: known only of these classes.
INTERLEAVED = {"query_key_value": ("GPTNeoXAttention", "BloomAttention")}
# These use one of the FUSED names for another order of rows.
NOT_FUSED = ("GPTBigCodeAttention", "CodeGenAttention", "MiniMaxLightningAttention")
QK_NORM = re.compile(r"(^|_)(q|k|qk|query|key)(_|$)")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")


@dataclass(frozen=True)
class Projections:
    """A layer's query and key weights and biases, as views into the parameters.

    query: tensors whose first dimension is the H query heads. key: the same for the H_kv key heads.
    Scaling both (or the query side alone) scales every score before bias and soft-cap.
    shards: where FSDP2 keeps weights in parts, the factors that stand for their rows here; else None.
    """

    query: list[Tensor]
    key: list[Tensor]
    num_heads: int
    num_key_heads: int
    shards: Shards | None = None

    @property
    def keys_shared(self) -> bool:
        """Whether several query heads read one key head (grouped-query attention)."""
        return self.num_key_heads != self.num_heads


def find(model: nn.Module, layer: str, num_heads: int, *, scaling: bool = True) -> Projections:
    """The query and key projections of the attention layer with that name.

    Looked for in the module and, where it has none, in the one around it. Raises ValueError where
    there is no such module, where its layout is not known for certain, where the weights are not there (meta
    device), and, with `scaling`, where the scores are not linear in the weights (QK-norm). Only with it are
    sharded weights found, which have no values here.
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
                    "(an offloaded model has them elsewhere, and puts them there for a forward only)"
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
    query_rows, key_rows = (_rows(module, layer, name, shards) for name in (query, key))
    size = _head_size(layer, len(query_rows[0]), num_heads)
    declared = getattr(module, "head_dim", size)
    key_heads, left = divmod(len(key_rows[0]), size)
    if declared != size or left or not key_heads or num_heads % key_heads:
        raise ValueError(
            f"expected {num_heads} query heads of {declared} and key heads of that size in layer {layer!r}, "
            f"got {query} with {len(query_rows[0])} and {key} with {len(key_rows[0])} outputs"
        )
    return Projections(
        [_by_head(rows, num_heads) for rows in query_rows],
        [_by_head(rows, key_heads) for rows in key_rows],
        num_heads,
        key_heads,
    )


def _fused(module: nn.Module, layer: str, num_heads: int, name: str, shards: Shards | None) -> Projections:
    if _class_name(module) in NOT_FUSED:
        raise ValueError(
            f"expected query, key and value rows one after the other in {layer}.{name}, "
            f"got another order, that of {_class_name(module)}"
        )
    if name == "c_attn" and _is_module(module, "q_attn"):  # GPT-2's cross attention: c_attn is k and v
        query_rows = _rows(module, layer, "q_attn", shards)
        size = _head_size(layer, len(query_rows[0]), num_heads)
        key_heads, start = num_heads, 0
        fused, expected = _rows(module, layer, name, shards), 2 * num_heads * size
    else:
        fused = _rows(module, layer, name, shards)
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
    return Projections(
        [_by_head(rows, num_heads) for rows in query_rows],
        [_by_head(rows[start:stop], key_heads) for rows in fused],
        num_heads,
        key_heads,
    )


def _interleaved(
    module: nn.Module, layer: str, num_heads: int, name: str, classes: tuple[str, ...], shards: Shards | None
) -> Projections:
    if _class_name(module) not in classes:
        raise ValueError(
            f"expected {layer}.{name} in a class whose row order is known {classes}, "
            f"got {_class_name(module)}"
        )
    rows = _rows(module, layer, name, shards)
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
        fused = [_values(module.in_proj_weight, layer, shards)]
        query, key = [fused[0][:width]], [fused[0][width : 2 * width]]
    else:
        query, key = ([_values(x, layer, shards)] for x in (module.q_proj_weight, module.k_proj_weight))
    if module.in_proj_bias is not None:
        bias = _values(module.in_proj_bias, layer, shards)
        query.append(bias[:width])
        key.append(bias[width : 2 * width])
    if module.bias_k is not None:
        key.append(_values(module.bias_k, layer, shards, dim=2).view(-1))
    return Projections(
        [_by_head(rows, num_heads) for rows in query],
        [_by_head(rows, num_heads) for rows in key],
        num_heads,
        num_heads,
    )


def _rows(module: nn.Module, layer: str, name: str, shards: Shards | None) -> list[Tensor]:
    """Weight (outputs, inputs) and, where there is one, bias (outputs,) of a plain linear projection.

    Factors for them, (outputs, 1) and (outputs,), where they are sharded.
    """
    projection = getattr(module, name)
    weight = own_parameter(projection, "weight")
    conv1d = type(projection).__name__ == "Conv1D"  # transformers' own: weight (inputs, outputs)
    plain = (isinstance(projection, nn.Linear) or conv1d) and weight is not None
    if not plain or not weight.is_floating_point() or weight.dim() != 2:
        raise _not_its_own(f"{layer}.{name}", projection)
    rows = _values(weight, f"{layer}.{name}", shards, dim=1 if conv1d else 0)
    rows = rows.t() if conv1d else rows
    if projection.bias is None:
        return [rows]
    return [rows, _values(projection.bias, f"{layer}.{name}", shards)]


def _values(parameter: Tensor, name: str, shards: Shards | None, dim: int = 0) -> Tensor:
    """The parameter itself or, where it is sharded, factors for it along `dim`."""
    if shards is not None:
        return shards.rows(parameter, dim)
    if type(parameter.data) is not Tensor:
        raise _not_its_own(name, parameter.data)
    return parameter.detach()


def _not_its_own(name: str, found: object) -> ValueError:
    return ValueError(
        f"expected {name} to be a linear layer with its own floating-point weight, got "
        f"{type(found).__module__}.{type(found).__name__} "
        "(merge adapters, gather shards, remove parametrizations first)"
    )


def _class_name(module: nn.Module) -> str:
    """Of the class that the model's author wrote: FSDP2 puts one of its own in front, for the same code."""
    first, *others = type(module).__mro__
    if others[0].__name__ == "FSDPModule":
        first = others[1]
    return first.__name__


def _by_head(rows: Tensor, heads: int) -> Tensor:
    """(heads * D, ...) as a view (heads, D, ...)."""
    return rows.unflatten(0, (heads, -1))


def _head_size(layer: str, rows: int, heads: int) -> int:
    if rows % heads:
        raise ValueError(
            f"expected the projection rows of layer {layer!r} to divide by {heads} heads, got {rows}"
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


@torch.no_grad()
def scale(projections: Projections, query: Tensor, key: Tensor | None) -> None:
    """Multiply each head's query weights by `query` (H,) and its key weights by `key` (H_kv,), in place."""
    for tensors, factors in ((projections.query, query), (projections.key, key)):
        for tensor in tensors if factors is not None else []:
            # In at least fp32: a bf16 factor would be off by half a percent.
            wide = torch.promote_types(tensor.dtype, torch.float32)
            tensor.mul_(factors.to(tensor.device, wide).view(-1, *(1,) * (tensor.dim() - 1)))
    if projections.shards is not None:
        projections.shards.multiply()
