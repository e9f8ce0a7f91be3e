"""A built model's weights, layer by layer: what scores they allow, whatever the data, and which to expect."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import compat, theory
from ..interventions import layout
from .design import Design
from .positions import position_bias

# The norm layer in front of a block's attention, by its name beside the attention.
BEFORE = (
    "ln_1",
    "input_layernorm",
    "attention_norm",
    "layernorm_before",
    "layer_norm1",
    "self_attn_layer_norm",
    "norm1",
    "ln1",
)
# Post-norm blocks of BERT's kind: attention reads what the block before, or the embeddings, normalised.
BERT_LAYERS = ("BertLayer", "RobertaLayer", "XLMRobertaLayer", "CamembertLayer")
QUERY_NORMS, KEY_NORMS = ("q_norm", "query_norm", "q_layernorm"), ("k_norm", "key_norm", "k_layernorm")
_INDEX = re.compile(r"^(.*\.)(\d+)$")
_PROBES = 4


@dataclass(frozen=True)
class LayerWeights:
    """What one layer's weights say, per query head, (H,) fp64, nats.

    bound: `theory.weight_logit_bound`. std: `theory.weight_score_std`. magnitude: largest scale |q| |k|.
    """

    layer: str
    bound: Tensor
    std: Tensor
    magnitude: Tensor


def read_weights(model: nn.Module, design: Design) -> tuple[list[LayerWeights], dict[str, str]]:
    """Every attention layer whose weights and norm layer are found, and for the others the reason.

    Dropout is taken as off (evaluation). Raises ValueError for a model without attention, or whose
    parameters hold no numbers (the meta device).
    """
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("expected a model with weights, got one on the meta device")
    found, reasons = [], {}
    names = [name for name, module in model.named_modules() if layout.holds(module)]
    if not names:
        raise ValueError(f"expected a model with attention, got {type(model).__name__} without any known")
    for name in names:
        try:
            found.append(_layer(model, name, design, len(found)))
        except ValueError as error:
            reasons[name] = str(error)
    return found, reasons


def _layer(model: nn.Module, name: str, design: Design, index: int) -> LayerWeights:
    module = model.get_submodule(name)
    weights = layout.find(model, name, _heads(module, design), scaling=False)
    if getattr(module, "is_cross_attention", False):
        raise ValueError("keys come from another sequence, whose norm is not known")
    norm = _norm_before(model, name)
    query, key = weights.query[0].float(), weights.key[0].float()
    heads = theory.fold_norm(query, key, norm, *(x[1] if len(x) > 1 else None for x in _sides(weights)))
    dim = query.shape[1]
    scale = _scale(model, module, design, index, dim)
    limits = [_qk_limit(module, names, dim, design) for names in (QUERY_NORMS, KEY_NORMS)]
    if (limits[0] is None) != (limits[1] is None):
        raise ValueError("only one of query and key is normalised, which is not read")
    rope = {"rotary": min(design.rotary, dim), "interleaved": design.interleaved}
    options = {"query_limit": limits[0], "key_limit": limits[1]}
    dtype = weights.query[0].dtype
    bias = position_bias(model, name, query.shape[0])
    bound = theory.weight_logit_bound(
        heads, scale, **rope, **options, softcap=design.softcap, bias=bias, dtype=dtype
    )
    lengths = theory.weight_logit_bound(heads, scale, rotary=dim, interleaved=None, **options)
    if limits[0] is None:
        std = theory.weight_score_std(heads, scale, **rope)
    else:  # lengths are fixed, directions are taken as random
        std = torch.full_like(bound, abs(scale) * limits[0] * limits[1] * dim**-0.5)
    return LayerWeights(name, bound, std, lengths)


def _sides(weights: layout.Projections) -> tuple[list[Tensor], list[Tensor]]:
    return weights.query, weights.key


def _heads(module: nn.Module, design: Design) -> int:
    for name in ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads"):
        value = getattr(module, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return design.n_heads


def _scale(model: nn.Module, module: nn.Module, design: Design, index: int, dim: int) -> float:
    for name in ("scaling", "scale"):
        value = getattr(module, name, None)
        if isinstance(value, float) and value > 0:
            scale = value
            break
    else:
        same = dim == design.head_dim and index < design.n_layers
        scale = design.scale_of(index) if same else dim**-0.5
    # YaRN and its like scale both q and k inside the rotation.
    turns = [getattr(m, "attention_scaling", None) for m in model.modules()]
    factors = [x for x in turns if isinstance(x, (int, float))]
    return scale * max(factors, default=1.0) ** 2 if design.rotary else scale


def _norm_before(model: nn.Module, name: str) -> theory.Norm:
    """The norm layer that the projections of attention `name` read from. Raises ValueError where not known."""
    path = name
    for _ in range(3):
        path = path.rpartition(".")[0]
        block = model.get_submodule(path)
        if type(block).__name__ in BERT_LAYERS:
            return _read(_bert_norm(model, path))
        if type(block).__name__.endswith("T5LayerSelfAttention"):
            return _read(block.layer_norm)
        for child in BEFORE:
            norm = compat.child(block, child)
            if norm is not None:
                if _after(block, child):
                    raise ValueError(
                        f"its block normalises after attention ({child}): its input is not bounded"
                    )
                return _read(norm)
        if not path:
            break
    raise ValueError("no norm layer known in front of it: its input is not bounded")


def _after(block: nn.Module, child: str) -> bool:
    if child == "self_attn_layer_norm":  # OPT says which; BART and its like normalise afterwards
        return getattr(block, "do_layer_norm_before", False) is not True
    if isinstance(block, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return not block.norm_first
    return "swinv2" in type(block).__name__.lower()


def _bert_norm(model: nn.Module, path: str) -> nn.Module:
    match = _INDEX.match(path)
    if match is None:
        raise ValueError(f"the block {path!r} has no number, so the one before it is not known")
    if int(match[2]) > 0:
        return model.get_submodule(f"{match[1]}{int(match[2]) - 1}.output.LayerNorm")
    root = match[1].removesuffix("encoder.layer.")
    body = model.get_submodule(root.rstrip("."))
    embeddings = compat.child(body, "embeddings")
    if hasattr(body, "embeddings_project") or embeddings is None or not hasattr(embeddings, "LayerNorm"):
        raise ValueError("no norm layer known in front of the first block")
    return embeddings.LayerNorm


@torch.no_grad()
def _read(module: nn.Module) -> theory.Norm:
    """Gain, bias and kind of a norm layer, found by running it: whatever its class calls them.

    y(x) + y(-x) = 2 bias, y(x) - y(-x) = 2 gain n(x), with n the layer or root-mean-square normalisation,
    whichever gives one gain for all inputs. Large inputs hide the epsilon, which only shortens n(x).
    Raises ValueError for a module that is neither.
    """
    weight = next((p for p in module.parameters() if p.dim() == 1), None)
    width = weight.numel() if weight is not None else _width(module)
    device = weight.device if weight is not None else torch.device("cpu")
    dtype = weight.dtype if weight is not None else torch.float32
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_PROBES, width, generator=generator, dtype=torch.float64)
    x = (100.0 * (x + 0.5)).to(dtype).double()
    plus, minus = (module(y.to(device, dtype)).double().cpu() for y in (x, -x))
    bias, odd = ((plus + minus) / 2.0).mean(0), (plus - minus) / 2.0
    tolerance = 16.0 * torch.finfo(dtype).eps
    for centred in (True, False):
        n = x - x.mean(-1, keepdim=True) if centred else x
        n = n / n.square().mean(-1, keepdim=True).sqrt()
        gain = (odd * n).sum(0) / n.square().sum(0)
        left = odd - gain * n
        if (left.abs() <= tolerance * (gain.abs() * n.abs()).amax().clamp(min=1e-30)).all():
            # Rounding of a narrow dtype is within the bound's own share for it.
            return theory.Norm(gain, bias, centred)
    raise ValueError(f"its norm layer {type(module).__name__} is neither LayerNorm nor RMSNorm")


def _width(module: nn.Module) -> int:
    shape = getattr(module, "normalized_shape", None)
    if not shape or len(shape) != 1:
        raise ValueError(f"its norm layer {type(module).__name__} has no parameter that tells its width")
    return int(shape[0])


def _qk_limit(module: nn.Module, names: tuple[str, ...], dim: int, design: Design) -> float | None:
    """Largest length of a head's query (or key) after its norm layer; None where there is none."""
    children = (compat.child(module, name) for name in names)
    norm = next((each for each in children if each is not None), None)
    if norm is None or isinstance(norm, nn.Identity):
        if design.qk_norm:
            raise ValueError("the configuration says QK-norm, but no norm layer of queries and keys is known")
        return None
    # Over one head; or, as in OLMo 2, over all heads at once, of which one may then hold the whole length.
    return _read(norm).limit
