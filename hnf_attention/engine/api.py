"""The public calls: check the arguments, then run the call."""

from __future__ import annotations

from torch import Tensor

from ..reference.options import Options
from ..statistics.eight_bit import check_descale, check_kinds, scaled, widened
from ..statistics.rows import RowStats
from .call import Call, check_sample, prepare
from .run import run, run_sample


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    seqlens: Tensor | None = None,
    extended: bool = False,
) -> tuple[Tensor, RowStats]:
    """Scaled dot-product attention that also returns the exact softmax statistics of every row.

    Arguments and layout are those of `torch.nn.functional.scaled_dot_product_attention`: query
    (B, H, M, D), key (B, H_kv, N, D), value (B, H_kv, N, D_v), all of one dtype on one device.
    H may be a multiple of H_kv (grouped-query attention). Scores are
    `softcap * tanh(scale * q.k / softcap) + attn_mask`, in natural-log units.

    attn_mask: boolean (True = attend) or additive (the query's dtype or fp32; -inf hides a key, and less than
        -1e16 counts as -1e16), broadcastable to (B, H, M, N). It combines with `is_causal` and `window_size`.
    is_causal: query i sees keys 0..i (top-left aligned).
    scale: D ** -0.5 when None.
    window_size: only keys with |i - j| < window_size are visible.
    softcap: logit soft-cap (Gemma 2, arXiv 2408.00118, section 2).
    sinks: (H,) learned sink logits, one more softmax element without a value (gpt-oss). A row without a visible
        key gives its sink as lse, as in FlashAttention 4.
    seqlens: cumulative lengths of packed sequences, (S + 1,) int32 or int64, 0 first and never
        decreasing: FlashAttention's `cu_seqlens`. Sequences lie end to end in a batch of 1 with M = N; a
        query sees keys of its own sequence only, and `is_causal`, `window_size` and `attn_mask` apply
        within it. Sequences may be empty; tokens past the last entry are empty rows. The numbers are
        checked where the tensor is on the CPU and nothing traces the call. On a GPU they are never read
        back: wrong ones give wrong results there, but no access outside the tensors.
    extended: also the other fields of `RowStats`; these are not differentiable.

    Returns the output (B, H, M, D_v) in the query's dtype and `RowStats` of (B, H, M) tensors.
    `out`, `lse` and `entropy` are differentiable in query, key, value, sinks and an additive mask: in reverse and
    forward mode, any number of times, and under transforms of `torch.func`. Kernels compute the first derivative in
    reverse mode, plain PyTorch the others. The mask's gradient is summed to its shape. On a GPU that takes
    memory: one number per score, (B, H, M, N), in the mask's dtype, or in fp32 if the mask broadcasts. fp64 and
    head dimensions of 0 or above 256 use the chunked PyTorch path on every device. Under autocast, inputs are cast as
    SDPA casts them.
    Raises ValueError or TypeError (expected, got) before anything runs.
    """
    call = prepare(
        query,
        key,
        value,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        window_size=window_size,
        softcap=softcap,
        sinks=sinks,
        seqlens=seqlens,
        extended=extended,
    )
    return run(call)  # type: ignore[return-value]  # a call with a value has an output


def attention_stats(
    query: Tensor,
    key: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    seqlens: Tensor | None = None,
    query_descale: Tensor | None = None,
    key_descale: Tensor | None = None,
    extended: bool = False,
    sample: tuple[int, int] | None = None,
) -> RowStats:
    """The row statistics of `attention()` without its output; no value is needed.

    Same arguments, errors and differentiability (`lse` and `entropy`) as `attention`, and

    query, key: also both of 8 bits, `torch.float8_e4m3fn` or `torch.float8_e5m2`. Such tensors are copied: to bf16,
        which holds their numbers, or with a scale to fp32.
    query_descale, key_descale: what 8-bit numbers are multiplied by, (B, H_kv), of packed sequences (S, H_kv), as
        FlashAttention 3 takes them; None is 1. Query heads that share a key head share its scale.
    sample: (period, phase), ints >= 1 and >= 0: measure one of every `period` consecutive blocks of 64 query
        rows; a sequence with fewer blocks gives one block. Consecutive phases take different blocks.
        `period` of them cover every row, exactly once if there are at least `period` blocks. Each (batch,
        head) takes blocks of its own. Of packed sequences, blocks are cut from the pack as a whole, across
        their borders.
        The result is compact, (B, H, M_s) with `row_index` saying which rows, and not differentiable.
    """
    descales = {"query_descale": query_descale, "key_descale": key_descale}
    check_kinds(query, key, descales)
    call = prepare(
        widened(query),
        widened(key),
        None,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        window_size=window_size,
        softcap=softcap,
        sinks=sinks,
        seqlens=seqlens,
        extended=extended,
    )
    given = {name: descale for name, descale in descales.items() if descale is not None}
    if given:
        for name, descale in given.items():
            check_descale(name, descale, call.key, call.options.seqlens)
        call = _scaled(call, query_descale, key_descale)
    return run(call)[1] if sample is None else run_sample(call, check_sample(sample))


def _scaled(call: Call, query_descale: Tensor | None, key_descale: Tensor | None) -> Call:
    """The call with scaled queries and keys, in fp32, also under autocast."""
    options = call.options
    mask = options.attn_mask
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    query, key = (
        scaled(x, descale, options.seqlens)
        for x, descale in ((call.query, query_descale), (call.key, key_descale))
    )
    return call._replace(query=query, key=key, options=options._replace(attn_mask=mask))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    options: Options,
    *,
    extended: bool = False,
    detached: bool = False,
) -> tuple[Tensor | None, RowStats]:
    """`attention` of tensors and options that `check` has accepted, in the dtype to compute in.

    detached: the statistics are outside autograd. Without a value the output is None or has no elements.
    """
    return run(Call(query, key, value, options, extended), detached)


def attend_sample(
    query: Tensor, key: Tensor, options: Options, sample: tuple[int, int], *, extended: bool = False
) -> RowStats:
    """`attention_stats` of a sample (period, phase) of the rows, for tensors and options as `attend` takes them."""
    return run_sample(Call(query, key, None, options, extended), sample)
