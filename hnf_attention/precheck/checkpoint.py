"""A built model's weights, layer by layer: the scores that they allow for any input, and those to expect."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .. import compat, theory
from ..interventions import layout, orders
from .design import Design
from .norms import norm_before, read_norm
from .positions import position_bias

QUERY_NORMS = ("q_norm", "query_norm", "q_layernorm", "query_layernorm")
KEY_NORMS = ("k_norm", "key_norm", "k_layernorm", "key_layernorm")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")


@dataclass(frozen=True)
class LayerWeights:
    """What one layer's weights say, per query head, (H,) fp64, nats.

    bound: `theory.weight_logit_bound`. std: `theory.weight_score_std`. magnitude: largest scale |q| |k|.
    """

    layer: str
    bound: Tensor = field(repr=False)
    std: Tensor = field(repr=False)
    magnitude: Tensor = field(repr=False)


def read_weights(model: nn.Module, design: Design) -> tuple[list[LayerWeights], dict[str, str]]:
    """Every attention layer whose weights and norm layer are found, and layer -> reason for the others.

    Dropout counts as off. Raises ValueError for a model without attention, and for one on the meta device, whose
    parameters have no values.
    """
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("expected a model with weights, got one on the meta device")
    found: list[LayerWeights] = []
    reasons: dict[str, str] = {}
    names = [name for name, module in model.named_modules() if orders.holds(module)]
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
        raise ValueError("its keys come from another sequence, whose norm is not known")
    norm = norm_before(model, name)
    sides = weights.query_by_head, weights.key
    query, key = (side[0].float() for side in sides)
    biases = (side[1] if len(side) > 1 else None for side in sides)
    heads = theory.fold_norm(query, key, norm, *biases)
    dim = query.shape[1]
    scale = _scale(model, module, design, index, dim)
    query_limit, key_limit = (_qk_limit(module, names, design) for names in (QUERY_NORMS, KEY_NORMS))
    if (query_limit is None) != (key_limit is None):
        raise ValueError("only one of query and key is normalised, which is not supported")
    rotary = min(design.rotary, dim)
    bound = theory.weight_logit_bound(
        heads,
        scale,
        rotary=rotary,
        interleaved=design.interleaved,
        query_limit=query_limit,
        key_limit=key_limit,
        softcap=design.softcap,
        bias=position_bias(model, name, query.shape[0]),
        dtype=weights.query[0].dtype,
    )
    magnitude = theory.weight_logit_bound(
        heads, scale, rotary=dim, interleaved=None, query_limit=query_limit, key_limit=key_limit
    )
    if query_limit is None or key_limit is None:
        std = theory.weight_score_std(heads, scale, rotary=rotary, interleaved=design.interleaved)
    else:  # QK-norm fixes the lengths; directions count as random
        std = torch.full_like(bound, abs(scale) * query_limit * key_limit * dim**-0.5)
    return LayerWeights(name, bound, std, magnitude)


def _heads(module: nn.Module, design: Design) -> int:
    for name in _HEADS:
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
    # YaRN and similar methods scale both q and k inside the rotation.
    turns = [getattr(m, "attention_scaling", None) for m in model.modules()]
    factors = [float(x) for x in turns if isinstance(x, (int, float))]
    return scale * max(factors, default=1.0) ** 2 if design.rotary else scale


def _qk_limit(module: nn.Module, names: tuple[str, ...], design: Design) -> float | None:
    """Largest length of a head's query (or key) after its norm layer; None if it has none."""
    children = (compat.child(module, name) for name in names)
    norm = next((each for each in children if each is not None), None)
    if norm is None or isinstance(norm, nn.Identity):
        if design.qk_norm:
            raise ValueError("the configuration says QK-norm, but no norm layer of queries and keys is known")
        return None
    # The layer normalises one head, or all heads at once (OLMo 2). Then one head may hold the whole length.
    return read_norm(norm).limit
