"""Catches attention that is written by hand, at its softmax.

The statistics are taken from the scores, which the model has computed. Measured is a softmax over the last dimension
that `evidence` finds to be attention: over scores (B, H, M, N), (B * H, M, N), (B, M, N) or (M, N), or in blocks of
queries, (B, H, blocks, M, N) or (B, blocks, H, M, N). Its queries and keys are not known, and neither are norms and
curvature. A compiled graph does not show what becomes of the result: there, a module counts whose class is named like
attention, or is one of the user's `attention_classes`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ... import compat
from ...errors import let_out
from ...reference import attention as reference
from ...reference import masks
from ...tracing import traced, transformed, without_dispatch_modes
from .. import evidence, observer
from ..call import COMPILED, Unmeasurable
from ..compiled import layers, operators, tracer
from ..coverage import is_attention
from ..measurement import Measurement
from ..patches import Patch
from ..scores import NEVER_A_SCORE, given

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
        if not observer.active or observer.measuring_owner() is None:
            return original(*args, **kwargs)
        thread = observer.thread
        before, thread.suspended = thread.suspended, True  # one name of softmax calls another
        try:
            result = original(*args, **kwargs)
            # Inside a backward it is the second forward of a checkpoint.
            if compat.running_backward() == -1:
                evidence.guarded(_saw, result, *args, **kwargs)
        finally:
            thread.suspended = before
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
        measured = functools.partial(_measured, owner, scores)
        owner.observer.observe(owner.layer, evidence.INTERCEPTOR, measured, COMPILED)


_operator = operators.operator("observe_softmax", "Tensor scores", _measure)


def _may_be_attention(input: Any, dim: Any) -> bool:
    """Whether the softmax is over the last dimension of a tensor that may hold scores."""
    if not isinstance(input, Tensor) or input.dim() < 3 or not input.is_floating_point():
        return False
    return dim in (-1, input.dim() - 1)


def _owner(input: Any = None, dim: Any = None, *_: Any, **__: Any) -> observer.Owner | None:
    """Who may be told that a transform of torch.func runs this softmax."""
    owner = observer.running_owner() if _may_be_attention(input, dim) else None
    return owner if owner is not None and is_attention(owner.module) else None


def _saw(result: Tensor, input: Any = None, dim: Any = None, *_: Any, **__: Any) -> None:
    if isinstance(input, Tensor) and isinstance(dim, int) and input.dim() > 1 and input.is_floating_point():
        evidence.saw_softmax(
            input.detach(), dim, result, functools.partial(_taken, input.detach(), result.detach())
        )


def _taken(scores: Tensor, result: Tensor, owner: observer.Owner) -> Callable[[], Measurement]:
    """What gives the measurement of these scores. It is taken now: the scores do not outlive their softmax."""
    try:
        with without_dispatch_modes():
            measurement = _measured(owner, scores, result)
    except Exception as error:
        let_out(error)
        failure = error.with_traceback(None)

        def fail() -> Measurement:
            raise failure

        return fail
    return lambda: measurement


@torch.no_grad()
def _measured(owner: observer.Owner, scores: Tensor, result: Tensor | None = None) -> Measurement:
    """result: the softmax of the scores, None where it is not known."""
    layer, module = owner.layer, owner.module
    if type(scores) is not Tensor or scores.is_nested or scores.is_meta or scores.numel() == 0:
        raise Unmeasurable(f"its softmax is over {tuple(scores.shape)} of a {type(scores).__name__}")
    if result is not None:
        result = _by_heads(result, module)
    scores = _by_heads(scores, module)
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
        result=result,
    )


def _by_heads(scores: Tensor, module: nn.Module) -> Tensor:
    """(B, H, M, N) of scores in any of the layouts that the file's head names."""
    heads = _number(module, _HEADS)
    if scores.dim() < 4:
        return _with_heads(scores, module, heads)
    if scores.dim() > 4:
        return _without_blocks(scores, heads)
    if heads is not None and scores.shape[1] != heads and scores.shape[2] == heads:
        return scores.transpose(1, 2)  # (B, M, H, window), as Longformer has it
    return scores


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


def _with_heads(scores: Tensor, module: nn.Module, heads: int | None) -> Tensor:
    """(B, H, M, N) of scores (M, N) or (B * H, M, N).

    heads: what the module says. How many sequences there are tells whether the module means these scores, as one of
    the heads of another module may know how many there are.
    """
    if scores.dim() == 2:
        return scores[None, None]
    rows = scores.shape[0]
    batch = _batch(module, scores.shape[1])
    if heads is None or rows % (heads * (batch or 1)):
        # Of a module that knows its heads, these may be one head's scores. Part of the heads would be counted wrongly.
        if batch is None or rows % batch or (heads is not None and rows != batch):
            raise Unmeasurable(
                f"its softmax is over {tuple(scores.shape)}, its heads (one of {', '.join(_HEADS)}) are {heads}, and "
                f"its sequences {batch}"
            )
        heads = rows // batch
    return scores.unflatten(0, (-1, heads))


def _batch(module: nn.Module, num_queries: int) -> int | None:
    """How many sequences the module was given, or the module around it if it has no parameters; None if not known."""
    inside = True
    for owner, _ in observer.running():
        inside = inside and owner.module is not module
        if inside:
            continue
        for tensor in observer.arguments(owner.module):
            if not isinstance(tensor, Tensor) or tensor.dim() < 2:
                continue
            if num_queries in evidence.lengths(tensor):
                one = tensor.dim() == 2 and tensor.is_floating_point()  # a sequence (N, D) without a batch
                return 1 if one else tensor.shape[0]
            if num_queries == tensor.shape[0]:  # sequences lie side by side in the second dimension
                return tensor.shape[1]
        if next(owner.module.parameters(), None) is not None:
            break
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
