"""The norm layers of a built model: which one feeds an attention, and what its gain and bias are."""

from __future__ import annotations

import re

import torch
from torch import nn

from .. import compat, theory

# The norm layer in front of a block's attention, by its name beside the attention.
BEFORE_ATTENTION = (
    "ln_1",
    "input_layernorm",
    "attention_norm",
    "layernorm_before",
    "layer_norm1",
    "self_attn_layer_norm",
    "norm1",
    "ln1",
)
# Post-norm blocks of BERT's kind: attention reads what the previous block, or the embeddings, normalised.
BERT_LAYERS = ("BertLayer", "RobertaLayer", "XLMRobertaLayer", "CamembertLayer")
_NUMBERED = re.compile(r"^(.*\.)(\d+)$")
_PROBES = 4


def norm_before(model: nn.Module, name: str) -> theory.Norm:
    """The norm layer that feeds the projections of the attention `name`. Raises ValueError if it is not known."""
    path = name
    for _ in range(3):
        path = path.rpartition(".")[0]
        block = model.get_submodule(path)
        if type(block).__name__ in BERT_LAYERS:
            return read_norm(_bert_norm(model, path))
        if type(block).__name__.endswith("T5LayerSelfAttention"):
            return read_norm(block.get_submodule("layer_norm"))
        for child in BEFORE_ATTENTION:
            norm = compat.child(block, child)
            if norm is not None:
                if _after_attention(block, child):
                    raise ValueError(
                        f"its block normalises after attention ({child}): its input is not bounded"
                    )
                return read_norm(norm)
        if not path:
            break
    raise ValueError("no norm layer is known in front of it: its input is not bounded")


@torch.no_grad()
def read_norm(module: nn.Module) -> theory.Norm:
    """Gain, bias and kind of a norm layer, found by running it: its class may call them anything.

    y(x) + y(-x) = 2 bias and y(x) - y(-x) = 2 gain n(x), where n is the layer or the root-mean-square
    normalisation, whichever gives one gain for all inputs. The inputs are large, so that the layer's epsilon
    does not show; it only shortens n(x).
    Raises ValueError for a module that is neither kind of normalisation.
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
            # A narrow dtype rounds the gain; the bound's own share for that dtype covers it.
            return theory.Norm(gain, bias, centred)
    raise ValueError(f"its norm layer {type(module).__name__} is neither LayerNorm nor RMSNorm")


def _after_attention(block: nn.Module, child: str) -> bool:
    """Whether this norm layer of the block comes after its attention, in spite of its name."""
    if (
        child == "self_attn_layer_norm"
    ):  # before attention only in OPT, which says so; BART and similar models have it after
        return getattr(block, "do_layer_norm_before", False) is not True
    if isinstance(block, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return not block.norm_first
    return "swinv2" in type(block).__name__.lower()


def _bert_norm(model: nn.Module, path: str) -> nn.Module:
    """The norm layer of the block before the BERT-like block at `path`, or of the embeddings."""
    match = _NUMBERED.match(path)
    if match is None:
        raise ValueError(f"the block {path!r} has no number, so the one before it is not known")
    if int(match[2]) > 0:
        return model.get_submodule(f"{match[1]}{int(match[2]) - 1}.output.LayerNorm")
    root = match[1].removesuffix("encoder.layer.")
    body = model.get_submodule(root.rstrip("."))
    norm = getattr(compat.child(body, "embeddings"), "LayerNorm", None)
    if hasattr(body, "embeddings_project") or not isinstance(norm, nn.Module):
        raise ValueError("no norm layer is known in front of the first block")
    return norm


def _width(module: nn.Module) -> int:
    shape = getattr(module, "normalized_shape", None)
    if not shape or len(shape) != 1:
        raise ValueError(f"its norm layer {type(module).__name__} has no parameter that tells its width")
    return int(shape[0])
