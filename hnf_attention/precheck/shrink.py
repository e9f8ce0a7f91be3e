"""A Hugging Face configuration made small around its attention, which stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .configuration import ALIASES

_VOCABULARY, _FEED_FORWARD, _EXPERTS, _POSITIONS = 512, 32, 64, 512
DEPTHS = (
    *ALIASES["n_layers"],
    "decoder_layers",
    "num_decoder_layers",
    "num_encoder_layers",
    "num_hidden_groups",
)
_FEED_FORWARDS = (
    "intermediate_size",
    "n_inner",
    "ffn_dim",
    "d_ff",
    "d_inner",
    "dff",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "ffn_hidden_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)
_MIXTURES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_VOCABULARIES = ("vocab_size", "decoder_vocab_size")
_NOT_BUILT = ("dtype", "torch_dtype", "quantization_config", "architectures")


class Unknown(ValueError):
    """The reason why the scores of a class are not known."""


def shrunk(kind: type, values: Mapping[str, Any], depth: int) -> Any:
    """The configuration of `kind` with these values, of up to `depth` layers, a small vocabulary and feed-forward part.

    Layers with softmax attention come first, if the values name the kind of each layer.
    Raises Unknown if the class refuses the sizes.
    """
    small = {name: value for name, value in values.items() if name not in _NOT_BUILT}
    layers = next((values[name] for name in DEPTHS if isinstance(values.get(name), int)), None)
    order = _attention_first(values.get("layer_types"), layers)
    for name, value in small.items():
        if name in DEPTHS and isinstance(value, int):
            small[name] = min(depth, value)
        elif name in _FEED_FORWARDS and isinstance(value, int):
            small[name] = min(_FEED_FORWARD, value)
        elif name in _MIXTURES and isinstance(value, int):
            small[name] = min(_EXPERTS, value)
        elif name in _VOCABULARIES and isinstance(value, int):
            small[name] = min(_VOCABULARY, value)
        elif name.endswith("_token_id") and isinstance(value, int) and value >= _VOCABULARY:
            small[name] = 0
        elif name == "max_source_positions" and isinstance(value, int):  # of audio, whose length is fixed
            small[name] = min(_VOCABULARY // 4, value)
        elif name == "attention_types" and value:  # GPT-Neo's: [[kinds, repetitions], ...]
            small[name] = [[value[0][0][:1], min(depth, layers or depth)]]
        elif (
            isinstance(value, list) and len(value) == layers and not any(isinstance(x, float) for x in value)
        ):
            small[name] = [value[i] for i in order[:depth]]
    if "attention_layers" in small:
        small["attention_layers"] = list(values["attention_layers"])[:1] * min(depth, layers or depth)
    return _made(kind, small)


def with_few_positions(config: Any) -> Any:
    """The configuration with a small table of positions."""
    values = config.to_dict()
    long = {name: _POSITIONS for name in ALIASES["seq_len"] if _count(values.get(name)) > _POSITIONS}
    return _made(type(config), values | long)


def halved(config: Any) -> Any:
    """The configuration half as wide, with half the heads of the same size.

    Raises Unknown if these numbers cannot be halved.
    """
    values = config.to_dict()
    for what in ("d_model", "n_heads", "n_kv_heads"):
        for name in ALIASES[what]:
            count = _count(values.get(name))
            if count % 2 and not (what == "n_kv_heads" and count == 1):
                raise Unknown(f"its layers are too large to be built, and {name} {count} cannot be halved")
            if count > 1:
                values[name] = count // 2
    if values == config.to_dict():
        raise Unknown("its layers are too large to be built")
    return _made(type(config), values)


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _attention_first(kinds: Any, layers: int | None) -> list[int]:
    """The numbers of the layers, those with softmax attention before the others."""
    if not isinstance(kinds, list) or len(kinds) != layers:
        return list(range(layers or 0))
    return sorted(range(len(kinds)), key=lambda i: "linear" in kinds[i] or "attention" not in kinds[i])


def _made(kind: Any, values: Mapping[str, Any]) -> Any:
    try:
        return kind.from_dict(dict(values))
    except Exception as error:  # whatever a class raises for sizes that it does not like
        text = (str(error).strip().splitlines() or [""])[0]
        raise Unknown(f"its configuration cannot be made small: {type(error).__name__}: {text}") from error
