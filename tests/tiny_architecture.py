"""A Hugging Face architecture as a tiny random model, built from its config."""

import inspect
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

BATCH, LENGTH, TARGET, IMAGE, VOCAB, WAVE = 2, 12, 7, 32, 99, 2000


def _same(size: int, *names: str) -> dict[str, int]:
    return dict.fromkeys(names, size)


#: Each config takes those that it has.
SIZES = {
    **_same(32, "hidden_size", "d_model", "n_embd", "embed_dim", "embedding_size", "projection_dim"),
    **_same(2, "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"),
    **_same(2, "num_encoder_layers", "num_decoder_layers", "num_key_value_heads", "num_experts_per_tok"),
    **_same(4, "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"),
    **_same(4, "encoder_num_attention_heads", "decoder_num_attention_heads", "encoder_num_key_value_heads"),
    **_same(4, "decoder_num_key_value_heads"),
    **_same(4, "decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"),
    **_same(4, "qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"),
    **_same(4, "num_experts", "num_local_experts", "n_routed_experts"),
    **_same(64, "intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim"),
    **_same(64, "max_position_embeddings", "n_positions", "max_seq_len", "moe_intermediate_size"),
    **_same(8, "head_dim", "d_kv", "v_head_dim", "kv_lora_rank", "patch_size"),
    **_same(1, "n_shared_experts", "first_k_dense_replace", "bos_token_id", "decoder_start_token_id"),
    **{"q_lora_rank": 16, "sliding_window": 5, "vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 2},
    **{"image_size": IMAGE, "num_channels": 3, "num_mel_bins": 16, "max_source_positions": 20},
    **{"layerdrop": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "use_cache": False},
}


@dataclass(frozen=True)
class Architecture:
    """model: name of the class. kind, special: for the table.

    config: keywords of the config beyond SIZES, which they override; None takes a size out again.
    inputs: arguments of forward beside the generic ones; None takes one out.
    unreturned: part of the names of layers whose attention weights the model does not return.
    incomparable: what the model returns in place of its attention weights.
    listed: part of the names of layers that cannot be measured, and are listed in `coverage`.
    implementations: where not all that the class supports are to be compared with its eager one.
    since: the major version of transformers from which it is built like this, and returns its weights.
    """

    model: str
    kind: str
    special: str = ""
    config: dict = field(default_factory=dict)
    inputs: dict = field(default_factory=dict)
    unreturned: str = ""
    incomparable: str = ""
    listed: str = ""
    implementations: tuple[str, ...] = ()
    since: int = 4

    @property
    def exists(self) -> bool:
        """Whether the installed version of transformers has it."""
        return int(transformers.__version__.split(".")[0]) >= self.since and hasattr(transformers, self.model)

    def compared(self) -> tuple[str, ...]:
        """Implementations, the default one first."""
        supported = getattr(transformers, self.model)._supports_sdpa
        return self.implementations or (("sdpa", "eager") if supported else ("eager",))

    def build(self, implementation: str) -> nn.Module:
        """In eval mode, with weights large enough for attention to differ from row to row."""
        cls = getattr(transformers, self.model)
        config = tiny(cls.config_class, self.config)
        torch.manual_seed(0)
        model = cls._from_config(config, attn_implementation=implementation)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=2 * parameter[0].numel() ** -0.5)
                elif not name.endswith(("weight", "scale")):
                    parameter.normal_(std=0.3)
        return model.eval()

    def arguments(self, model: nn.Module) -> dict:
        """Of forward; the second text or sound is shorter, and padded on its right."""
        given = _generic(model.main_input_name, inspect.signature(model.forward).parameters) | self.inputs
        return {name: value for name, value in given.items() if value is not None}


def tiny(cls: type, overrides: dict):
    """A config of `cls` and of the configs in it, of small sizes."""
    default = cls()
    given = {name: size for name, size in SIZES.items() if _is_size(default, name)} | overrides
    for name, inner in vars(default).items():
        if isinstance(inner, transformers.PretrainedConfig):
            given[name] = tiny(type(inner), overrides.get(name, {})).to_dict()
    return cls(**{name: value for name, value in given.items() if value is not None})


def _is_size(config, name: str) -> bool:
    """Whether `name` is one number of this config, and not derived from others."""
    derived = isinstance(getattr(type(config), name, None), property)
    return not derived and hasattr(config, name) and not isinstance(getattr(config, name), (list, tuple))


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def ids(length: int = LENGTH, first: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(first, VOCAB - 9, (BATCH, length), generator=generator)


def mask(length: int = LENGTH, padding: int = 3) -> torch.Tensor:
    kept = torch.ones(BATCH, length, dtype=torch.long)
    kept[1, -padding:] = 0
    return kept


def _generic(main: str, takes) -> dict[str, torch.Tensor]:
    made = {
        "input_ids": ids,
        "decoder_input_ids": lambda: ids(TARGET),
        "pixel_values": lambda: random(BATCH, 3, IMAGE, IMAGE),
        "input_features": lambda: random(BATCH, 16, 40),
        "input_values": lambda: random(BATCH, WAVE),
    }
    masks = {"input_ids": mask, "input_values": lambda: mask(WAVE, WAVE // 3)}
    given = {name: make() for name, make in made.items() if name in (main, "decoder_input_ids")}
    if main in masks:
        given["attention_mask"] = masks[main]()
    return {name: tensor for name, tensor in given.items() if name in takes}
