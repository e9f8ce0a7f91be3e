"""What the attention of a model's class does with random weights: its first layers are built, and run once."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .. import compat
from .capture import Enough, ScoreCapture
from .checkpoint import KEY_NORMS, QUERY_NORMS
from .configuration import ALIASES
from .shrink import DEPTHS, Unknown, halved, shrunk, with_few_positions

# Parameters of the layers that are built: about a second and 0.3 GB, and ten seconds and 1.2 GB.
QUICK, MOST = 60_000_000, 300_000_000
_TOKENS = 97  # no dimension of a model has this size, so that scores are told by their shape
_SAMPLES = 1 << 7  # heads times sequences, over which the spread is averaged
_HYBRID = 8  # layers, of which hybrid models have softmax attention in one
# Fields of models whose parts are other models, which may be downloaded.
_PARTS = ("backbone", "backbone_config", "use_timm_backbone", "use_pretrained_backbone")
_NORMS = (
    ("q_norm", "query_norm", "q_layernorm", "query_layernorm"),
    ("k_norm", "key_norm", "k_layernorm", "key_layernorm"),
)


@dataclass(frozen=True)
class RandomLayers:
    """Scores of the first attention layers of a class with random weights, nats.

    stds: for each layer, the root mean square over rows and heads of the spread within a row, of the last third of
        the rows. early: the same of the first layer's rows in the second fifth. They differ if positions add to scores.
    config: the configuration of these layers. narrower: whether it is narrower than the one asked about.
    qk_norm: whether an attention has norm layers of its queries and of its keys.
    """

    stds: tuple[float, ...]
    early: float
    config: Any
    narrower: bool
    qk_norm: bool


def random_layers(config: Any, depth: int, most: int | None = None) -> RandomLayers:
    """The first layers of the class that this Hugging Face configuration belongs to.

    depth: how many are built. The vocabulary, and what is wide behind attention, are made small.
    most: parameters of these layers; attention is halved until they have no more. None keeps its width.
    Weights and tokens are random, and the same at every call. Nothing is downloaded, and code from a model's
    repository is not run.
    Raises Unknown if the class is not part of transformers, if its layers have more than MOST parameters, or if its
    attention cannot be built, run or recognised.
    """
    from transformers import MODEL_MAPPING

    if type(config) not in MODEL_MAPPING:
        raise Unknown(f"transformers has no model of {type(config).__name__} alone")
    # A dictionary for JSON writes tuples, which may hold infinities, in a way that is not read back.
    tuples = {name: value for name, value in vars(config).items() if isinstance(value, tuple)}
    values = config.to_dict() | tuples
    part = next((name for name in _PARTS if values.get(name)), None)
    if part is not None:
        raise Unknown(f"a part of it is another model ({part})")
    return _random_layers(_Values(type(config), values), depth, most)


class _Values:
    """The values of a configuration, as the key of a cache."""

    def __init__(self, kind: type, values: dict[str, Any]) -> None:
        self.kind, self.values = kind, values
        self._text = f"{kind} {json.dumps(values, sort_keys=True, default=str)}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Values) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


@lru_cache(maxsize=64)
def _random_layers(config: _Values, depth: int, most: int | None) -> RandomLayers:
    kind, values = config.kind, config.values
    for layers in (depth, _HYBRID) if depth == 1 else (depth,):
        small, narrower = shrunk(kind, values, layers), False
        if _num_parameters(small) > QUICK:
            small = with_few_positions(small)
        while most is not None and _num_parameters(small) > most:
            small, narrower = halved(small), True
        if _num_parameters(small) > MOST:
            raise Unknown("its layers are too large to be built")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = _built(small)
            with _reason("its class cannot be initialised"):
                compat.initialise(model, {name: values[name] for name in DEPTHS if name in values})
            scores = _run(model, small, depth)
        if scores:
            stds = tuple(_spread(found, 2 / 3, 1.0) for found in scores)
            if not all(0 < std < math.inf for std in stds):
                raise Unknown(f"with random weights its scores spread by {stds[0]:g}")
            return RandomLayers(stds, _spread(scores[0], 0.2, 0.4), small, narrower, _has_qk_norm(model))
    raise Unknown("no softmax over its tokens was seen")


def _num_parameters(config: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in _built(config).parameters())


def _built(config: Any) -> nn.Module:
    from transformers import AutoModel

    options: dict[str, Any] = {"trust_remote_code": False, "dtype": torch.float32}
    with _reason("its class cannot be built"):
        try:
            model: nn.Module = AutoModel.from_config(config, attn_implementation="eager", **options)
        except ValueError:  # of a class without an eager implementation
            model = AutoModel.from_config(config, **options)
    return model.eval()


def _run(model: nn.Module, config: Any, depth: int) -> list[Tensor]:
    """The scores of the first `depth` attentions, (B, H, N, N), NaN at hidden keys."""
    heads = next((n for n in (getattr(config, "num_attention_heads", None),) if isinstance(n, int)), 1)
    sequences = max(1, _SAMPLES // heads) if _num_elements(model) < QUICK // 4 else 1
    with _reason("its class cannot run on random input"):
        lengths = [getattr(config, name, None) for name in ALIASES["seq_len"]]
        # Some tables of positions skip a few places. Models without a table have no length, or one below 1.
        tokens = min([_TOKENS, *(n - 4 for n in lengths if isinstance(n, int) and n > 4)])
        sample = _sample(model, config, sequences, tokens)
        capture = ScoreCapture(tokens if "input_ids" in sample else None, depth)
        try:
            with torch.no_grad(), capture:
                model(**sample)
        except Enough:
            pass
        except Exception:  # after some attention, whose scores are known
            if not capture.scores:
                raise
    return capture.scores


def _num_elements(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _sample(model: Any, config: Any, sequences: int, tokens: int) -> dict[str, Any]:
    """Random input of the kind that the model takes. Raises Unknown for a kind that is not known."""
    name = model.main_input_name
    sample: dict[str, Any] = {}
    if name == "input_ids":
        sample[name] = torch.randint(5, config.vocab_size, (sequences, tokens))
    elif name == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        sample[name] = torch.randn(sequences, config.num_channels, height, width)
    elif name == "input_features" and hasattr(config, "max_source_positions"):
        sample[name] = torch.randn(sequences, config.num_mel_bins, 2 * config.max_source_positions)
    else:
        raise Unknown(f"its class takes {name}, which are not made up")
    if config.is_encoder_decoder:
        sample["decoder_input_ids"] = torch.randint(5, config.vocab_size, (sequences, tokens))
    if "input_ids" in sample and hasattr(config, "use_cache"):
        sample["use_cache"] = False
    return sample


def _spread(scores: Tensor, start: float, stop: float) -> float:
    """Root mean square spread within the rows of this part of a sequence."""
    rows = scores[..., int(start * scores.shape[-2]) : int(stop * scores.shape[-2]), :]
    seen = ~rows.isnan()
    centred = rows - rows.nanmean(-1, keepdim=True)
    return float((centred.square().nansum(-1) / seen.sum(-1).clamp(min=1)).mean().sqrt())


def _has_qk_norm(model: nn.Module) -> bool:
    children = [dict(module.named_children()) for module in model.modules()]
    return any(
        all(any(name in each for name in side) for side in (QUERY_NORMS, KEY_NORMS)) for each in children
    )


@contextmanager
def _reason(what: str) -> Iterator[None]:
    """Anything that a class raises is a reason: nobody asked for this run."""
    try:
        yield
    except Unknown:
        raise
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0]
        raise Unknown(f"{what}: {type(error).__name__}: {text[:200]}") from error
