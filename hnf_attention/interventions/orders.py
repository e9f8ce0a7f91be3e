"""The orders in which models keep query and key weights: one block of rows for each head, in one projection or two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from ..compat import child, own_parameter
from .projections import Projections, Reader
from .shards import own_class

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
# Rows ordered by heads, and q, k, v within each head: these classes do so. Of others the name alone does not tell.
INTERLEAVED = {"query_key_value": ("GPTNeoXAttention", "BloomAttention", "FalconAttention")}
# Classes that use a FUSED name for another order of rows.
NOT_FUSED = ("GPTBigCodeAttention", "CodeGenAttention", "MiniMaxLightningAttention")
KEY_HEADS = (
    "num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads", "n_head_kv", "n_query_groups", "num_query_groups"
)  # fmt: skip
QUERY_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")
LATENT_QUERIES = ("q_b_proj", "q_proj")  # with and without a latent of the queries

#: Reads the weights of a module by one order of rows.
Reading = Callable[[Reader], Projections]


def holds(module: nn.Module) -> bool:
    """Whether a module has children named like query and key projections, in an order known to `read` or not."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    names = {name for name, child in module.named_children()}
    return any({q, k} <= names for q, k in SEPARATE) or bool(names & {*FUSED, *INTERLEAVED})


def candidates(module: nn.Module, num_heads: int) -> list[Reading]:
    """What the query and key weights of a module may be, by the names of its projections; none if it has none.

    The likeliest comes first. Each raises ValueError for names and shapes that do not fit it.
    """
    if isinstance(module, nn.MultiheadAttention):
        return [partial(_multihead, module, num_heads)]
    if _is_module(module, "kv_b_proj") and any(_is_module(module, name) for name in LATENT_QUERIES):
        return [partial(_latent, module, num_heads)]
    for query, key in SEPARATE:
        if _is_module(module, query) and _is_module(module, key):
            names = query, key
            gated = [partial(_gated, module, num_heads, *names, inner=inner) for inner in (True, False)]
            return [partial(_separate, module, num_heads, *names), *gated]
    for name, classes in INTERLEAVED.items():
        if _is_module(module, name):
            if own_class(module).__name__ in classes:
                return [partial(_grouped, module, num_heads, name)]
            return _fused_orders(module, num_heads, name, by_kind_first=False)
    for name in FUSED:
        if _is_module(module, name):
            return _fused_orders(module, num_heads, name, by_kind_first=True)
    return []


def key_weights(module: nn.Module) -> list[Tensor]:
    """The weights that make a module's keys, alone or beside others, by the names of its projections."""
    if isinstance(module, nn.MultiheadAttention):
        found = module.in_proj_weight if module.in_proj_weight is not None else module.k_proj_weight
        return [] if found is None else [found]
    names = ("kv_b_proj", *(key for _, key in SEPARATE), *INTERLEAVED, *FUSED)
    projections = [projection for name in names if (projection := child(module, name)) is not None]
    weights = [own_parameter(projection, "weight") for projection in projections]
    return [weight for weight in weights if weight is not None]


def _fused_orders(module: nn.Module, num_heads: int, name: str, by_kind_first: bool) -> list[Reading]:
    by_kind = partial(_fused, module, num_heads, name)
    by_head = partial(_interleaved, module, num_heads, name)
    rest = [partial(_grouped, module, num_heads, name)]
    return [by_kind, by_head, *rest] if by_kind_first else [by_head, *rest, by_kind]


def _separate(module: nn.Module, num_heads: int, query: str, key: str, reader: Reader) -> Projections:
    query_rows, key_rows = (reader.linear(module, name) for name in (query, key))
    size = _head_size(reader.layer, len(query_rows[0]), num_heads)
    declared = getattr(module, "head_dim", size)
    key_heads, left = divmod(len(key_rows[0]), size)
    if declared != size or left or not key_heads or num_heads % key_heads:
        raise ValueError(
            f"expected {num_heads} query heads of {declared} and key heads of that size in layer {reader.layer!r}, "
            f"got {query} with {len(query_rows[0])} and {key} with {len(key_rows[0])} outputs"
        )
    return reader.by_head(query_rows, key_rows, num_heads, key_heads)


def _fused(module: nn.Module, num_heads: int, name: str, reader: Reader) -> Projections:
    if own_class(module).__name__ in NOT_FUSED:
        raise ValueError(
            f"expected query, key and value rows one after the other in {reader.layer}.{name}, "
            f"got another order, that of {own_class(module).__name__}"
        )
    fused = reader.linear(module, name)
    if name == "c_attn" and _is_module(module, "q_attn"):  # GPT-2's cross attention: c_attn is k and v
        query_rows = reader.linear(module, "q_attn")
        size = _head_size(reader.layer, len(query_rows[0]), num_heads)
        key_heads, start, expected = num_heads, 0, 2 * num_heads * size
    else:
        key_heads = _key_heads(module, num_heads)
        size = _head_size(reader.layer, len(fused[0]), num_heads + 2 * key_heads)
        start, expected = num_heads * size, (num_heads + 2 * key_heads) * size
        query_rows = [rows[:start] for rows in fused]
    declared = getattr(module, "head_dim", size)
    if declared != size:
        raise ValueError(
            f"expected heads of {declared} in {reader.layer}.{name}, got {num_heads} heads of {size} in its "
            f"{len(fused[0])} outputs"
        )
    if len(fused[0]) != expected:
        raise ValueError(f"expected {expected} outputs of {reader.layer}.{name}, got {len(fused[0])}")
    stop = start + key_heads * size
    return reader.by_head(query_rows, [rows[start:stop] for rows in fused], num_heads, key_heads)


def _interleaved(module: nn.Module, num_heads: int, name: str, reader: Reader) -> Projections:
    """q, k and v of one head, then those of the next."""
    rows = reader.linear(module, name)
    _head_size(reader.layer, len(rows[0]), 3 * num_heads)
    parts = [part.unflatten(0, (num_heads, 3, -1)) for part in rows]
    return reader.projections([part[:, 0] for part in parts], [part[:, 1] for part in parts])


def _grouped(module: nn.Module, num_heads: int, name: str, reader: Reader) -> Projections:
    """The queries of one key head, its keys and values, then those of the next (Falcon, Megatron, older litgpt)."""
    groups = _key_heads(module, num_heads)
    rows = reader.linear(module, name)
    _head_size(reader.layer, len(rows[0]), num_heads + 2 * groups)
    if num_heads % groups:
        raise ValueError(f"expected {num_heads} query heads in groups of one size, got {groups} key heads")
    queries = num_heads // groups
    parts = [part.unflatten(0, (groups, queries + 2, -1)) for part in rows]
    query = [part[:, 0] if queries == 1 else part[:, :queries] for part in parts]
    return reader.projections(query, [part[:, queries] for part in parts], num_heads)


def _gated(
    module: nn.Module, num_heads: int, query: str, key: str, reader: Reader, inner: bool
) -> Projections:
    """A gate beside the queries in their projection. inner: beside those of each head (Qwen3-Next)."""
    query_rows, key_rows = (reader.linear(module, name) for name in (query, key))
    size = _head_size(reader.layer, len(query_rows[0]), 2 * num_heads)
    key_heads, left = divmod(len(key_rows[0]), size)
    if left or not key_heads or num_heads % key_heads:
        raise ValueError(
            f"expected key heads of {size} in layer {reader.layer!r}, got {len(key_rows[0])} rows"
        )
    if inner:
        queries = [rows.unflatten(0, (num_heads, 2, size))[:, 0] for rows in query_rows]
    else:
        queries = [rows.unflatten(0, (2, num_heads, size))[0] for rows in query_rows]
    return reader.projections(queries, [rows.unflatten(0, (key_heads, size)) for rows in key_rows])


def _latent(module: nn.Module, num_heads: int, reader: Reader) -> Projections:
    """Multi-head latent attention (DeepSeek, Kimi). The rotary keys are one head that all query heads share.

    The rule of Kimi K2 (arXiv 2507.20534): the rotary queries take the whole factor, other queries and keys its root.
    """
    if not reader.changing:
        raise ValueError(
            f"expected keys that are projected from the input of layer {reader.layer!r}, got latent ones"
        )
    name = next(name for name in LATENT_QUERIES if _is_module(module, name))
    sizes = [getattr(module, f"qk_{part}_head_dim", None) for part in ("nope", "rope")]
    query, key = (reader.linear(module, x) for x in (name, "kv_b_proj"))
    plain, rotary = (size if isinstance(size, int) else 0 for size in sizes)
    if plain < 1 or rotary < 1:
        raise ValueError(
            f"expected qk_nope_head_dim and qk_rope_head_dim in layer {reader.layer!r}, got {sizes}"
        )
    if len(query[0]) != num_heads * (plain + rotary) or len(key[0]) % num_heads:
        raise ValueError(
            f"expected {num_heads} query heads of {plain + rotary} in {reader.layer}.{name}, got {len(query[0])} rows"
        )
    queries = [rows.unflatten(0, (num_heads, -1)) for rows in query]
    keys = [rows.unflatten(0, (num_heads, -1))[:, :plain] for rows in key]
    width = getattr(child(module, "kv_a_proj_with_mqa"), "in_features", None)
    rest = [x[:, plain:] for x in queries]
    return reader.projections([x[:, :plain] for x in queries], keys, rest=rest, width=width)


def _multihead(module: nn.MultiheadAttention, num_heads: int, reader: Reader) -> Projections:
    if module.num_heads != num_heads:
        raise ValueError(f"expected {module.num_heads} heads for layer {reader.layer!r}, got {num_heads}")
    width = module.embed_dim
    if module.in_proj_weight is not None:
        fused = reader.rows(module.in_proj_weight, "in_proj_weight")
        query, key = [fused[:width]], [fused[width : 2 * width]]
    else:
        query, key = ([reader.rows(getattr(module, f"{x}_proj_weight"), f"{x}_proj_weight")] for x in "qk")
    if module.in_proj_bias is not None:
        bias = reader.rows(module.in_proj_bias, "in_proj_bias")
        query.append(bias[:width])
        key.append(bias[width : 2 * width])
    if module.bias_k is not None:
        key.append(reader.rows(module.bias_k, "bias_k", dim=2).view(-1))
    return reader.by_head(query, key, num_heads, num_heads)


def _head_size(layer: str, rows: int, heads: int) -> int:
    if rows % heads:
        raise ValueError(
            f"expected layer {layer!r}, whose projections have {rows} rows, to have heads of one size, got {heads} "
            "heads of queries, keys and values together"
        )
    return rows // heads


def declared_heads(module: nn.Module) -> int | None:
    """The number of query heads that a module or its config names, None for none."""
    return _declared(module, QUERY_HEADS)


def _key_heads(module: nn.Module, num_heads: int) -> int:
    declared = _declared(module, KEY_HEADS)
    return num_heads if declared is None else declared


def _declared(module: nn.Module, names: Sequence[str]) -> int | None:
    for holder in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def _is_module(module: nn.Module, name: str) -> bool:
    return child(module, name) is not None
