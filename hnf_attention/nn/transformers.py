"""Hugging Face transformers' attention, computed by this project: `attn_implementation="hnf_attention"`.

A model looks its attention function up under that name in AttentionInterface, and the function that builds its masks in
AttentionMaskInterface. Masks are those of "sdpa": none where a causal flag says it all, else boolean. They carry
padding, sliding windows, chunks and packed sequences. A model in which some attention passes the interface by gets the
masks of "eager", which that attention takes as well.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import compat
from ..instrumentation.handed_over import Extra, Given, attend, attend_with_weights
from ..statistics.checks import expected
from ..tracing import captured
from . import rows

NAME = "hnf_attention"
_WINDOW = "_hnf_attention_window"


def register() -> None:
    """Make the name known to transformers. A second call does nothing new.

    Raises ImportError if transformers is missing or has no such interfaces (4.57 has).
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            f"expected transformers >= 4.57 with AttentionInterface and AttentionMaskInterface, got {error}; "
            "pip install 'hnf-attention[huggingface]'"
        ) from error
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_mask(*args: Any, config: Any = None, **options: Any) -> Tensor | None:
    """The mask of the layers of one kind in a model with that config, as transformers' own functions make it.

    Takes what these take. A mask that is a causal window and nothing else says so in an attribute: kernels that know
    the window skip the keys outside of it, and need no mask.
    """
    from transformers.masking_utils import eager_mask, sdpa_mask

    make = sdpa_mask if config is not None and compat.takes_boolean_masks(config) else eager_mask
    mask = make(*args, config=config, **options)
    window = None if mask is None or torch.compiler.is_compiling() else _window(**options)
    if mask is not None and window is not None:
        setattr(mask, _WINDOW, window)
    return mask


def _window(
    mask_function: Any = None,
    q_length: Any = None,
    kv_length: Any = None,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> int | None:
    """The causal window that a mask with these arguments is; None if it is anything else."""
    sizes = q_length, kv_length, q_offset, kv_offset
    if not all(type(x) is int for x in sizes) or q_length != kv_length or q_offset != kv_offset:
        return None
    window = compat.causal_window(mask_function)
    if window is None or attention_mask is None:
        return window
    if type(attention_mask) is not Tensor or attention_mask.is_meta or captured():
        return None  # there are no numbers, or none that may be waited for
    return window if bool(attention_mask.all()) else None


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """What a model of transformers calls: (the output (B, M, H, D_v), the weights (B, H, M, N) if they are asked for).

    query (B, H, M, D), key (B, H_kv, N, D), value (B, H_kv, N, D_v). The module keeps the statistics: `row_stats`.
    attention_mask: boolean or additive, (B or 1, H or 1, M, N or more); it carries the sliding window, too.
    is_causal: of a call without a mask and with several queries; what the module says by default.
    softcap, s_aux: a soft-cap, and learned sinks (H,). position_bias: added to the scores.
    options: others, which "sdpa" leaves to the mask as well. `output_attentions` asks for the weights in memory.
    Raises ValueError for a head_mask, and for what `attention` refuses.
    """
    if options.get("head_mask") is not None:
        raise expected('no head_mask with attn_implementation="hnf_attention"', "one")
    num_queries, num_keys = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # As in "sdpa": a single query sees the whole cache.
    causal = num_queries > 1 and attention_mask is None and bool(causal)
    if (
        causal and num_keys > num_queries
    ):  # the first forward of a static cache, whose other keys are not there yet
        num_keys = num_queries
        key, value = key[:, :, :num_keys], value[:, :, :num_keys]
    window = None if torch.compiler.is_compiling() else getattr(attention_mask, _WINDOW, None)
    if window is not None and num_queries == num_keys:
        attention_mask, causal = None, True
    else:
        window = None
    mask = _combined(attention_mask, position_bias, num_keys)
    given = Given(query, key, value, mask, dropout, causal, scaling)
    extra = Extra(window, softcap, s_aux, "transformers hnf_attention")
    keep = partial(rows.keep, module)
    weights = None
    if options.get("output_attentions"):
        out, weights = attend_with_weights(given, extra, keep, module)
    else:
        out = attend(given, extra, keep, module)
    return out.transpose(1, 2).contiguous(), weights


def _combined(mask: Tensor | None, bias: Tensor | None, num_keys: int) -> Tensor | None:
    """One mask from both, cut to the keys there are."""
    if mask is not None and mask.dim() != 4:
        raise expected("attention_mask with four dimensions", tuple(mask.shape))
    mask, bias = (None if x is None else x[..., :num_keys] for x in (mask, bias))
    if mask is None or bias is None:
        return bias if mask is None else mask
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else mask + bias
