"""How a design is read from a configuration of any kind."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from ..theory import number_format
from .design import Design, positive

# The names that configurations use for a field, tried in this order.
ALIASES: dict[str, tuple[str, ...]] = {
    "d_model": ("d_model", "hidden_size", "n_embd", "embed_dim", "dim", "width", "model_dim"),
    "n_heads": (
        "n_heads",
        "num_attention_heads",
        "n_head",
        "num_heads",
        "heads",
        "encoder_attention_heads",
    ),
    "n_kv_heads": ("n_kv_heads", "num_key_value_heads", "num_kv_heads", "kv_heads"),
    "head_dim": ("head_dim", "d_head", "d_kv", "attention_head_size"),
    "n_layers": ("n_layers", "num_hidden_layers", "n_layer", "num_layers", "layers", "encoder_layers"),
    "seq_len": (
        "seq_len",
        "max_position_embeddings",
        "n_positions",
        "n_ctx",
        "max_seq_len",
        "max_sequence_length",
        "seq_length",
        "context",
    ),
    "init_std": ("init_std", "initializer_range", "init_method_std"),
    "softcap": ("softcap", "attn_logit_softcapping"),
    "window": ("window", "sliding_window"),
    "dtype": ("dtype", "torch_dtype"),
}
# Fields of Hugging Face configurations that look like misspelt names of ours.
_RESEMBLING = {
    "attention_head_dim",
    "attention_heads",
    "attention_hidden_size",
    "decoder_attention_heads",
    "decoder_layers",
    "decoder_num_attention_heads",
    "decoder_self_attention_heads",
    "dim_head",
    "emb_dim",
    "embed_dims",
    "encode_proj_layers",
    "encoder_num_attention_heads",
    "hidden_sizes",
    "max_decoder_position_embeddings",
    "max_encoder_position_embeddings",
    "max_ep_len",
    "mel_dim",
    "model_in_dim",
    "num_encoder_layers",
    "num_position_embeddings",
    "same_length",
    "sliding_windows",
}
_MISSPELT = 0.85  # difflib's ratio: one or two wrong letters of eight
NEEDED = ("d_model", "n_heads", "seq_len")
# Own choice: ten times the layers of DeepNet (arXiv:2203.00555), the deepest published. The report lists each layer.
MOST_LAYERS = 10_000
ASSUMED_STD = 0.02
# Families whose attention normalises queries and keys without a field that says so.
QK_NORM_TYPES = ("qwen3", "qwen3_moe", "qwen3_next", "gemma3", "gemma3_text", "olmo2", "olmo3", "olmoe")
QK_NORM_FIELDS = ("qk_norm", "use_qk_norm", "qk_layernorm")
# RoPE turns the two halves of a head together in some families, and neighbouring dimensions in others. For a
# family in neither list it is not known.
HALVES = (
    "falcon",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gpt_neox",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo",
    "olmo2",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "stablelm",
    "starcoder2",
)
INTERLEAVED = ("gptj", "codegen", "cohere", "cohere2", "glm", "glm4", "ernie4_5")
_T5 = ("t5", "mt5", "umt5")


class _Reader:
    """Finds each field under one of its names; `sources` remembers which.

    asked: every name that was looked up. Alternatives are therefore looked up all, in a list, before `any` judges them.
    """

    def __init__(self, config: Any, given: Mapping[str, Any]):
        self.config, self.given = config, given
        self.sources: dict[str, str] = {}
        self.asked: set[str] = set()

    def raw(self, name: str) -> Any:
        self.asked.add(name)
        if isinstance(self.config, Mapping):
            return self.config.get(name)
        try:
            return getattr(self.config, name, None)
        except Exception:  # transformers refuses a field that varies across layers, with an error of its own
            return None

    def find(self, what: str, default: Any = None, why: str = "") -> Any:
        if self.given.get(what) is not None:
            self.asked.update(ALIASES[what])
            self.sources[what] = "given"
            return self.given[what]
        for name in ALIASES[what]:
            if name == "torch_dtype" and hasattr(self.config, "to_diff_dict"):
                continue  # transformers' old name of `dtype`, which warns
            value = self.raw(name)
            if value is not None:
                self.sources[what] = f"config: {name}"
                return value
        if what in NEEDED and default is None:
            raise ValueError(
                f"expected {what} in the configuration, got none of {', '.join(ALIASES[what])}"
                + ("; give seq_len" if what == "seq_len" else "")
            )
        self.sources[what] = why
        return default

    def count(self, what: str, default: int | None = None, why: str = "") -> int:
        value = self.find(what, default, why)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"expected {what} to be an integer of at least 1, got {value!r}")
        return value

    def positive(self, what: str, default: float | None, why: str) -> float | None:
        value = self.find(what, default, why)
        return value if value is None else positive(what, value)


def read_design(config: Any, **given: Any) -> Design:
    """A `Design` from a Hugging Face configuration, a mapping, or any object with such attributes.

    given: fields such as seq_len and dtype. They win over the configuration; None counts as not given.
    Beside the names in `ALIASES`, plain numbers may have `temperature` (T / sqrt(head_dim), 1 is usual), `scale`,
    `rope` and `qk_norm`.
    Raises ValueError for a needed field that is missing (with the names tried), a name that is a misspelt field, a size
    that is not a positive integer, more than `MOST_LAYERS` layers, heads that do not divide the width, and an unknown
    dtype.
    """
    if config is None:
        raise ValueError(
            "expected a configuration, got None, and a model without a `.config`: give one, such as "
            '{"d_model": 768, "n_heads": 12, "seq_len": 1024}'
        )
    config = hugging_face(config) or config
    read = _Reader(config, given)
    family = str(read.raw("model_type") or "")
    d_model, n_heads = read.count("d_model"), read.count("n_heads")
    head_dim = _head_dim(read, d_model, n_heads)
    n_kv_heads = read.count("n_kv_heads", *_default_kv(read, n_heads))
    if n_heads % n_kv_heads:
        raise ValueError(f"expected n_kv_heads to divide the {n_heads} heads, got {n_kv_heads}")
    n_layers = read.count("n_layers", 1, "assumed: 1")
    refuse_depth({"n_layers": n_layers})
    seq_len = read.count("seq_len")
    scale, layer_scale = _scale(read, head_dim, n_layers)
    query_std, key_std = _init(read, family, d_model, head_dim)
    dtype = number_format(read.find("dtype", "float32", "assumed: float32")).name
    qk_norm = any([bool(read.raw(name)) for name in QK_NORM_FIELDS]) or family in QK_NORM_TYPES
    rotary = _rotary(read, head_dim)
    softcap, windows = read.positive("softcap", None, "none"), _windows(read, n_layers, seq_len)
    correlation = _correlation(read)
    unused = sorted(_strange(config) - read.asked)
    for name in unused:
        _refuse_misspelt(name, read.asked)
    plain = isinstance(config, Mapping)  # configurations of Hugging Face have many other fields
    return Design(
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        n_layers=n_layers,
        seq_len=seq_len,
        query_std=query_std,
        key_std=key_std,
        scale=scale,
        softcap=softcap,
        qk_norm=qk_norm,
        rotary=rotary,
        interleaved=True if family in INTERLEAVED else False if family in HALVES else None,
        dtype=dtype,
        windows=windows,
        layer_scale=layer_scale,
        correlation=correlation,
        sources=read.sources,
        unused=tuple(unused) if plain else (),
    )


def hugging_face(config: Any) -> Any:
    """The Hugging Face configuration that this is, or that its `model_type` names; None for others.

    Of a vision-language model it is that of the text part, which attends.
    Raises ValueError as `refuse_depth`.
    """
    if isinstance(config, Mapping) and config.get("model_type"):
        from transformers import AutoConfig

        refuse_depth(config)
        values = dict(config)
        try:
            config = AutoConfig.for_model(values.pop("model_type"), **values)
        except Exception:  # an unknown type, or values that its class refuses
            return None
    return config.get_text_config() if hasattr(config, "get_text_config") else None


def refuse_depth(values: Mapping[str, Any]) -> None:
    """Raise ValueError for more than `MOST_LAYERS` layers. Classes of transformers list them one by one."""
    for name in ALIASES["n_layers"]:
        if isinstance(values.get(name), int) and values[name] > MOST_LAYERS:
            raise ValueError(f"expected at most {MOST_LAYERS:,} layers in {name}, got {values[name]:,}")


def _strange(config: Any) -> set[str]:
    """The names of plain numbers, or those of a Hugging Face configuration that its class does not know."""
    if isinstance(config, Mapping):
        return set() if config.get("model_type") else {name for name in config if isinstance(name, str)}
    if not hasattr(config, "to_diff_dict"):
        return set()
    try:
        return set(vars(config)) - set(vars(type(config)()))
    except Exception:  # of a class that has no default values: what it knows cannot be told
        return set()


def _refuse_misspelt(name: str, asked: set[str]) -> None:
    """Raise ValueError if nothing asks for this name, but for one that differs in a letter or two."""
    known = asked.union(*ALIASES.values())
    if name in known or name in _RESEMBLING or name.endswith(tuple(f"_{other}" for other in known)):
        return
    meant = difflib.get_close_matches(name, sorted(known), 1, _MISSPELT)
    if meant:
        raise ValueError(
            f"expected names of fields in the configuration, got {name!r}: is {meant[0]!r} meant?"
        )


def _head_dim(read: _Reader, d_model: int, n_heads: int) -> int:
    parts = [read.raw(name) for name in ("qk_nope_head_dim", "qk_rope_head_dim")]
    if all(isinstance(part, int) for part in parts):  # multi-head latent attention
        read.sources["head_dim"] = "config: qk_nope_head_dim + qk_rope_head_dim"
        return sum(parts)
    if any(read.raw(name) is not None for name in ALIASES["head_dim"]) or read.given.get("head_dim"):
        return read.count("head_dim")
    if d_model % n_heads:
        raise ValueError(f"expected n_heads to divide d_model, got {n_heads} heads and d_model {d_model}")
    read.sources["head_dim"] = "derived: d_model / n_heads"
    return d_model // n_heads


def _default_kv(read: _Reader, n_heads: int) -> tuple[int, str]:
    if read.raw("multi_query") and not read.raw("new_decoder_architecture"):
        read.given = {
            **read.given,
            "n_kv_heads": 1,
        }  # these configurations may name another number, which is not used
        return 1, "config: multi_query"
    return n_heads, "assumed: as many as heads"


def _scale(read: _Reader, head_dim: int, n_layers: int) -> tuple[float, tuple[float, ...]]:
    read.sources["scale"] = "derived: head_dim^-1/2"
    scale = head_dim**-0.5
    special: dict[str, Callable[[Any], float]] = {
        "scale": lambda x: positive("scale", x),
        "attention_multiplier": lambda x: positive("attention_multiplier", x),
        "query_pre_attn_scalar": lambda x: positive("query_pre_attn_scalar", x) ** -0.5,
        "temperature": lambda x: head_dim**-0.5 / positive("temperature", x),
    }
    for name, convert in special.items():
        value = read.given.get(name, read.raw(name))
        # The `temperature` of a Hugging Face configuration is for sampling.
        if value is not None and not (name == "temperature" and hasattr(read.config, "to_diff_dict")):
            scale, read.sources["scale"] = convert(value), f"config: {name}"
            break
    family = read.raw("model_type")
    if family in _T5 or read.raw("scale_attn_weights") is False:
        scale, read.sources["scale"] = 1.0, "config: unscaled"
    if read.raw("scale_attn_by_inverse_layer_idx"):
        return scale, tuple(1.0 / (layer + 1) for layer in range(n_layers))
    return scale, ()


def _init(read: _Reader, family: str, d_model: int, head_dim: int) -> tuple[float, float]:
    if family in _T5:  # their initialisation takes the place of a scale
        factor = float(read.raw("initializer_factor") or 1.0)
        read.sources["init_std"] = "config: initializer_factor"
        return factor * (d_model * head_dim) ** -0.5, factor * d_model**-0.5
    std = read.positive("init_std", None, f"assumed: {ASSUMED_STD}") or ASSUMED_STD
    return std, std


def _rotary(read: _Reader, head_dim: int) -> int:
    parameters = read.raw("rope_parameters")
    turned = any([read.raw(name) for name in ("rope", "rope_theta", "rotary_dim", "rope_scaling")])
    turned |= bool(parameters) or read.raw("position_embedding_type") == "rope"
    if not turned:
        return 0
    if isinstance(read.raw("rotary_dim"), int):
        return min(read.raw("rotary_dim"), head_dim)
    share = read.raw("partial_rotary_factor") or read.raw("rotary_pct")
    if share is None and isinstance(parameters, Mapping):
        share = parameters.get("partial_rotary_factor")
    return min(head_dim, max(2, int(head_dim * float(share or 1.0))))


def _correlation(read: _Reader) -> float:
    """If an input is the sum of a word, a position and a segment embedding, all tokens share a third of it."""
    if not read.raw("type_vocab_size"):
        return 0.0
    read.sources["correlation"] = "config: type_vocab_size"
    return 1.0 / 3.0


def _windows(read: _Reader, n_layers: int, seq_len: int) -> tuple[int, ...]:
    window = read.find("window", None, "none")
    if window is None or read.raw("use_sliding_window") is False:
        return ()
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"expected window to be an integer of at least 1, got {window!r}")
    kinds = read.raw("layer_types") or ["sliding_attention"] * n_layers
    return tuple(window if "sliding" in kind else seq_len for kind in list(kinds)[:n_layers])
