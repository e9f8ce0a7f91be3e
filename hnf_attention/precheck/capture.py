"""Keeps the scores of a model's attention while it runs, whatever code computes them."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_FEWEST_KEYS = 16
_LATEST = 16  # softmaxes: a measurement may compute some of its own after the model's
_SECONDS = 20.0  # a layer takes one or two; some kinds of linear attention take minutes without their kernels
_NEVER_A_SCORE = -5e3  # with random weights; models hide a key with -1e4, or less


def _is_softmax(func: Any) -> bool:
    """By name: a function that stands in its place during a measurement keeps the name."""
    return getattr(func, "__name__", None) == "softmax"


class Enough(Exception):
    """Ends a run whose further results nobody reads."""


class ScoreCapture(TorchFunctionMode):
    """Keeps the scores of the first attentions that run, then raises Enough.

    tokens: N, of scores (B, H, N, N) or (B * H, N, N); one more column is a learned sink. None takes any square from
        16 keys on, where the number of tokens is not known.
    depth: how many attentions. scores: what was kept, fp64, NaN at hidden keys.
    Raises TimeoutError in a run of more than 20 seconds.
    """

    def __init__(self, tokens: int | None, depth: int) -> None:
        super().__init__()
        self.tokens, self.depth = tokens, depth
        self.scores: list[Tensor] = []
        self._end = time.monotonic() + _SECONDS

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if time.monotonic() > self._end:
            raise TimeoutError(f"it took more than {_SECONDS:g} seconds")
        if _is_softmax(func):
            self._keep(args[0] if args else kwargs["input"])
        elif func is functional.scaled_dot_product_attention:
            self._keep(_fused_scores(*args, **kwargs))
        return func(*args, **kwargs)

    def _keep(self, scores: Tensor) -> None:
        if scores.dim() < 3:
            return
        rows, keys = scores.shape[-2:]
        square = rows == keys >= _FEWEST_KEYS if self.tokens is None else rows == self.tokens
        if not square or keys not in (rows, rows + 1):
            return
        wide = scores[..., :rows].double()
        self.scores.append(torch.where(wide > _NEVER_A_SCORE, wide, torch.nan))
        if len(self.scores) == self.depth:
            raise Enough


class LatestScores(TorchFunctionMode):
    """Keeps what the latest softmaxes were taken of, oldest first, until `taken` is called."""

    def __init__(self) -> None:
        super().__init__()
        self._scores: deque[Tensor] = deque(maxlen=_LATEST)

    def taken(self, *layouts: tuple[int, ...]) -> Tensor | None:
        """The oldest that has one of these shapes without its last dimension; all are forgotten."""
        found = next((scores for scores in self._scores if tuple(scores.shape[:-1]) in layouts), None)
        self._scores.clear()
        return found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_softmax(func):
            self._scores.append(args[0] if args else kwargs["input"])
        return func(*args, **kwargs)


def _fused_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The scores of a call of `scaled_dot_product_attention`, with its arguments."""
    group = query.shape[-3] // key.shape[-3] if enable_gqa else 1
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = factor * query @ key.repeat_interleave(group, -3).transpose(-1, -2)
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    if attn_mask is None:
        return scores
    return scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
