"""Catches attention that is written by hand, at its softmax.

The statistics are taken from the scores, which the model has computed. Measured is a softmax over the last dimension
inside a module whose class is named like attention: over scores (B, H, M, N) or (B * H, M, N), or in blocks of queries,
(B, H, blocks, M, N) or (B, blocks, H, M, N). Its queries and keys are not known, and neither are norms and curvature.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ... import compat
from ...reference import attention as reference
from ...reference import masks
from ...tracing import traced, transformed
from .. import observer
from ..call import COMPILED, Unmeasurable
from ..compiled import layers, operators, tracer
from ..coverage import is_attention
from ..measurement import Measurement
from ..patches import Patch
from ..scores import NEVER_A_SCORE, given

INTERCEPTOR = "softmax"
# Some models hide a key with -1e4, or with fp16's smallest number in wider scores. Such a number counts as hidden only
# beside scores that are ordinary.
LOW, ORDINARY = -9e3, 3e3
_HEADS = ("num_heads", "num_attention_heads", "n_head", "n_heads", "nhead", "heads", "num_attn_heads")
_HEAD_DIM = ("head_dim", "attention_head_size", "head_size", "d_k", "d_head", "dim_head")
_WIDTH = ("embed_dim", "hidden_size", "d_model", "n_embd", "all_head_size", "inner_dim", "dim")


def install(modules: Iterable[nn.Module]) -> list[Patch]:
    """Replace softmax under its three names, and where files of these modules imported one."""
    modules = list(modules)
    places = [functional, torch, torch.Tensor]
    # A function is pickled by its name, which must lead to it. If a module holds F.softmax, that name is left alone:
    # the function calls the method of the tensor, which is caught.
    if any(value is functional.softmax for module in modules for value in vars(module).values()):
        places.remove(functional)
    return [patch for place in places for patch in Patch.everywhere(place, "softmax", _interceptor, modules)]


def _interceptor(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def softmax(*args: Any, **kwargs: Any) -> Tensor:
        if transformed():
            if traced():
                _beside(*args, **kwargs)
            else:
                observer.list_transformed(_owner, *args, **kwargs)
            return original(*args, **kwargs)
        # As in `observer.run`: a step that is not measured pays for this branch alone.
        owner = observer.measuring_owner(_owner, *args, **kwargs) if observer.active else None
        if owner is None:
            return original(*args, **kwargs)
        observer.thread.suspended = True  # one name of softmax calls another
        try:
            result = original(*args, **kwargs)
            # Inside a backward it is the second forward of a checkpoint.
            if compat.running_backward() == -1:
                _observe(owner, *args, **kwargs)
        finally:
            observer.thread.suspended = False
        return result

    return softmax


def _beside(input: Any = None, dim: Any = None, *_: Any, **__: Any) -> None:
    """Leave the operator in the graph. To be traced."""
    if _may_be_attention(input, dim):
        layer, _heads = tracer.find_layer(input, attention_only=True)
        if layer is not None:
            _operator(layer, input.detach())


def _measure(layer: Tensor, scores: Tensor) -> None:
    """What the operator does when its graph runs."""
    owner = layers.owner_of(layer)
    if owner is not None:
        measured = functools.partial(_measured, owner.layer, owner.module, scores)
        owner.observer.observe(owner.layer, INTERCEPTOR, measured, COMPILED)


_operator = operators.operator("observe_softmax", "Tensor scores", _measure)


def _may_be_attention(input: Any, dim: Any) -> bool:
    """Whether the softmax is over the last dimension of a tensor that may hold scores."""
    if not isinstance(input, Tensor) or input.dim() < 3 or not input.is_floating_point():
        return False
    return dim in (-1, input.dim() - 1)


def _owner(input: Any = None, dim: Any = None, *_: Any, **__: Any) -> observer.Owner | None:
    if not _may_be_attention(input, dim):
        return None
    owner = observer.running_owner(lambda module: not isinstance(module, nn.Softmax))
    return owner if owner is not None and is_attention(owner.module) else None


def _observe(owner: observer.Owner, input: Tensor, *_: Any, **__: Any) -> None:
    measured = functools.partial(_measured, owner.layer, owner.module, input.detach())
    owner.observer.observe(owner.layer, INTERCEPTOR, measured)


@torch.no_grad()
def _measured(layer: str, module: nn.Module, scores: Tensor) -> Measurement:
    if type(scores) is not Tensor or scores.is_nested or scores.is_meta or scores.numel() == 0:
        raise Unmeasurable(f"its softmax is over {tuple(scores.shape)} of a {type(scores).__name__}")
    heads = _number(module, _HEADS)
    if scores.dim() == 3:
        if heads is None or scores.shape[0] % heads:
            raise Unmeasurable(
                f"its softmax is over {tuple(scores.shape)}, and its heads (one of {', '.join(_HEADS)}) "
                f"are {heads}"
            )
        scores = scores.unflatten(0, (-1, heads))
    elif scores.dim() > 4:
        scores = _without_blocks(scores, heads)
    elif heads is not None and scores.shape[1] != heads and scores.shape[2] == heads:
        scores = scores.transpose(1, 2)  # (B, M, H, window), as Longformer has it
    _, heads, num_queries, num_keys = scores.shape
    ordinary = torch.where(scores > LOW, scores.abs(), 0.0).amax((2, 3), keepdim=True) < ORDINARY

    def part(rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        return _with_visible(masks.take_rows(scores, rows), ordinary)

    own_keys = num_queries == num_keys
    return given(
        layer,
        part,
        scores.shape,
        _head_dim(module, heads),
        scores.dtype,
        own_keys=own_keys,
        device=scores.device,
    )


def _with_visible(scores: Tensor, ordinary: Tensor) -> tuple[Tensor, Tensor]:
    """(scores of some rows, fp32 or fp64; which of them belong to visible keys).

    ordinary: boolean (B, H, 1, 1), whether all scores of the head above LOW are small.
    """
    extreme = max(NEVER_A_SCORE, torch.finfo(scores.dtype).min / 2)
    scores = scores.to(reference.compute_dtype(scores))
    # Low scores hide no key if the row has no others, or if its head has large ones: these scores grew.
    masked = (ordinary & (scores.amax(3, keepdim=True) > LOW)) & (scores < LOW)
    return scores, ~((scores < extreme) | masked)  # NaN is visible


def _number(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """The first of these attributes, of the module or of its config, that is a positive int."""
    for place in (module, getattr(module, "config", None)):
        for name in names:
            number = getattr(place, name, None)
            if isinstance(number, int) and not isinstance(number, bool) and number > 0:
                return number
    return None


def _head_dim(module: nn.Module, heads: int) -> int:
    """D of the module, 1 where neither it nor its config tells."""
    width = _number(module, _WIDTH)
    return _number(module, _HEAD_DIM) or (1 if width is None or width % heads else width // heads)


def _without_blocks(scores: Tensor, heads: int | None) -> Tensor:
    """(B, H, all queries, N) of scores (B, H, blocks, M, N) or (B, blocks, H, M, N)."""
    if scores.dim() != 5 or (scores.shape[1] == heads) == (scores.shape[2] == heads):
        raise Unmeasurable(
            f"which dimension of its softmax over {tuple(scores.shape)} is its {heads} heads (one of "
            f"{', '.join(_HEADS)}) cannot be told"
        )
    return (scores if scores.shape[1] == heads else scores.transpose(1, 2)).flatten(2, 3)
