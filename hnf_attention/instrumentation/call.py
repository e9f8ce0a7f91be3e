"""One attention call, in the layout and the words of `hnf_attention.attention`, whichever interceptor caught it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import compat
from ..engine.call import autocast, check
from ..reference.context import hidden_keys
from ..reference.options import Options
from ..statistics.rows import RowStats
from .shared_masks import once

EAGER, COMPILED = "eager", "compiled"  # the places where a call may run
EIGHT_BIT = "its inputs are of 8 bits"
WRITTEN_MASK = "its mask is written out for each call"
FAILED_IN_GRAPH = "measuring failed in a compiled graph"
FIRST_IN_CAPTURE = (
    "its first measured call is inside the capture of a CUDA graph: run the model once before it"
)


class Unmeasurable(Exception):
    """This call cannot be measured, for a reason that the coverage report repeats.

    lasting: the reason holds for every later call of the layer.
    """

    def __init__(self, reason: str, *, lasting: bool = False):
        super().__init__(reason)
        self.lasting = lasting


# Made for every measured call: frozen would cost four times as much.
@dataclass(slots=True, eq=False, repr=False)
class AttentionCall:
    """query (B, H, M, D), key (B, H_kv, N, D), value (B, H_kv, N, D_v), and what shapes the scores.

    attn_mask: boolean (True = attend) or additive with -inf for hidden keys, outside autograd.
    interceptor: which one caught the call, for the coverage report.
    from_output: makes what the model's own attention returns of our output (B, H, M, D_v).
    not_fused: why our attention must not take the place of the model's in this call; None if it may.
    probe_preferred: why mode="auto" leaves the output to the model although `not_fused` is None; None if it does not.
    output_of: makes our output (B, H, M, D_v) of what the model's own attention returns; H is 1 where the heads are
        joined already. It, or what it makes, is None where the output is not known.
    check: compares the model's own attention with ours, once per layer. True once it could decide; raises
        Unmeasurable where they differ.
    modify: changes and hides the finished scores, where no field above can say how. It gets scores (B, H, R, N), fp32
        or fp64, and the numbers of their queries, int64 (B, H, R), and returns scores and which are visible, boolean.
        Such a call is probed in plain PyTorch.
    place: EAGER or COMPILED.
    window_size: as in `attention`: only keys with |i - j| < window_size are visible.
    own_rows: gives the statistics that the model's own attention computed with its output, once it has run. The call is
        probed where it, or what it gives, is None.
    seqlens: as in `attention`: borders of sequences that lie end to end in one row.
    casts: whether autocast changes the dtypes that the model's attention computes in, as it does for SDPA.
    copied: why query, key, value or the mask were made for this description, so that keeping them takes memory.
    lse_of: makes lse (B, H, M), in nats, of what the model's own attention returns; it, or what it makes, is None
        where that is not known. It is compared with ours, once per layer.
    max_logit_of: likewise makes the largest score of each head over the batch and its queries, (H,).
    stored: the dtype of what the model's attention got, where query and key are copies in a wider one.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    is_causal: bool
    scale: float | None
    softcap: float | None
    sinks: Tensor | None
    interceptor: str
    from_output: Callable[[Tensor], Any]
    not_fused: str | None
    probe_preferred: str | None
    output_of: Callable[[Any], Tensor | None] | None = None
    check: Callable[[AttentionCall], bool] | None = None
    modify: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    place: str = EAGER
    window_size: int | None = None
    own_rows: Callable[[], RowStats | None] | None = None
    seqlens: Tensor | None = None
    casts: bool = True
    copied: str | None = None
    lse_of: Callable[[Any], Tensor | None] | None = None
    max_logit_of: Callable[[Any], Tensor | None] | None = None
    stored: torch.dtype | None = None

    def __repr__(self) -> str:
        names = ("is_causal", "scale", "window_size", "softcap")
        options = {name: getattr(self, name) for name in names}
        tensors = {"attn_mask": self.attn_mask, "sinks": self.sinks, "seqlens": self.seqlens}
        shown = [f"{name}={value}" for name, value in options.items() if value]
        shown += [f"{name} {tuple(value.shape)}" for name, value in tensors.items() if value is not None]
        return (
            f"AttentionCall of {self.interceptor}: query {tuple(self.query.shape)}, key {tuple(self.key.shape)}, "
            + ", ".join([str(self.dtype).removeprefix("torch."), *shown])
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the queries that the model's attention computes with."""
        return self.stored or self.query.dtype

    @property
    def why_left(self) -> str | None:
        """Why the output is left to the model's own attention: `not_fused`, or how the call is differentiated."""
        return "forward-mode differentiation" if compat.current_level() >= 0 else self.not_fused

    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of `attention` and `attention_stats`."""
        return {
            "attn_mask": self.attn_mask,
            "is_causal": self.is_causal,
            "scale": self.scale,
            "window_size": self.window_size,
            "softcap": self.softcap,
            "sinks": self.sinks,
            "seqlens": self.seqlens,
        }

    def output(self, result: Any) -> Tensor | None:
        """The output of the model's own attention, (B, H or 1, M, any), from what it returned; None if not known."""
        output = None if self.output_of is None else self.output_of(result)
        batch, heads, num_queries, _ = self.query.shape
        shapes = [(batch, most, num_queries) for most in (1, heads)]
        return output if isinstance(output, Tensor) and tuple(output.shape[:3]) in shapes else None

    def cast(self) -> None:
        """Bring the tensors to the dtype that the model's attention computes in."""
        if not self.casts:
            return
        self.query, self.key, self.value, self.attn_mask = autocast(
            self.query, self.key, self.value, self.attn_mask
        )

    def validated(self) -> Options:
        """What shapes the scores, checked; raises ValueError or TypeError as `attention` does."""
        return check(self.query, self.key, self.value, **self.keywords())


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is an ordinary dense one with numbers in it."""
    ordinary = type(tensor) is Tensor or type(tensor) is nn.Parameter
    return ordinary and not tensor.is_nested and not tensor.is_meta


def require_plain(**tensors: Tensor | None) -> None:
    """Raise Unmeasurable for a tensor that is not an ordinary dense one with numbers in it."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
            raise Unmeasurable(f"{name} is a {type(tensor).__name__}, not a plain tensor")
        if tensor.is_nested:
            raise Unmeasurable(f"{name} is a nested tensor")
        if tensor.is_meta:
            raise Unmeasurable(f"{name} is on the meta device")


def hide(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask whose hidden keys are at -inf, in a dtype that `attention` takes beside `dtype`.

    Models hide a key with torch.finfo(dtype).min in an additive mask. Kept as it is, the key would count as visible,
    with a score of -1e38. Everything below half of that number becomes -inf.
    """
    if not mask.is_floating_point():
        return mask
    return once(("hide", dtype), mask, lambda: hidden(mask, dtype))


def hidden(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """`hide` of an additive mask, computed anew."""
    mask = mask.masked_fill(mask < torch.finfo(mask.dtype).min / 2, -torch.inf)
    return mask if mask.dtype == dtype else mask.float()


def keys_hidden(options: Options, batch: int, num_queries: int, num_keys: int) -> Tensor | None:
    """`hidden_keys` of a call, once for all calls of a forward with the same mask."""
    if options.attn_mask is None:
        return None
    sizes = batch, num_queries, num_keys
    return once(("hidden keys", *sizes), options.attn_mask, lambda: hidden_keys(options, *sizes))


def why_not_fused(dropout_p: float, *biases: Tensor | None) -> str | None:
    """Why the output is left to the model's own attention, as far as dropout and additive masks decide; else None."""
    if dropout_p > 0:
        return "dropout"
    if any(bias is not None and bias.requires_grad for bias in biases):
        return "the additive mask requires a gradient"
    return None
