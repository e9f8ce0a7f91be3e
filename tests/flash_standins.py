"""Stand-ins for FlashAttention 2, 3 and 4, with the signatures of the public source (2.8.4, August 2026).

They compute in plain PyTorch, sequence by sequence, as the package's documentation says: causal masks and windows are
aligned to the bottom right. Nothing here uses hnf_attention.
"""

import math
import sys
from types import ModuleType

import torch

STATISTICS = ("lse", "entropy", "max_logit", "min_logit")


def scores_of(q, k, scale, causal=False, window=(-1, -1), softcap=0.0, slopes=None, first=0):
    """Scores (H, M, N) in fp64 and which are seen (M, N), of one sequence: q (M, H, D), k (N, H_kv, D)."""
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, 1).double()
    scores = torch.einsum("mhd,nhd->hmn", q.double(), k) * scale
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    diagonal = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0]
    j = torch.arange(k.shape[0])
    left, right = (math.inf if x is None or x < 0 else x for x in window)
    seen = (j >= diagonal - left) & (j <= diagonal + (0 if causal else right)) & (j >= first)
    if slopes is not None:
        scores = scores - slopes.double()[:, None, None] * (diagonal - j).abs()
    return scores.masked_fill(~seen, -torch.inf), seen


def statistics_of(scores, seen, sink=None):
    """The statistics (H, M) of a sequence's scores, fp64, by name."""
    nothing = torch.full((*scores.shape[:2], 1), -torch.inf, dtype=torch.float64)
    exits = torch.cat(
        (scores, nothing if sink is None else sink.double()[:, None, None].expand_as(nothing)), 2
    )
    lse = exits.logsumexp(-1)
    entropy = torch.special.entr((exits - lse[..., None]).exp()).nan_to_num(0.0).sum(-1)
    largest = torch.cat((scores, nothing), 2).amax(-1)
    smallest = torch.cat((scores.masked_fill(~seen, torch.inf), -nothing), 2).amin(-1)
    return dict(zip(STATISTICS, (lse, entropy, largest, smallest)))


def one(q, k, v, scale=None, sink=None, **shape):
    """(out (M, H, D_v), lse (H, M)) of one sequence; both in the tensors' dtype or fp32."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores, seen = scores_of(q, k, scale, **shape)
    lse = statistics_of(scores, seen, sink)["lse"]
    p = (scores - lse.where(lse.isfinite(), 0.0)[..., None]).exp()
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1).double()
    return torch.einsum("hmn,nhd->mhd", p, v).to(q.dtype), lse.float()


def each(q, k, v, slopes=None, **shape):
    """`one` of each sequence of a batch: out (B, M, H, D_v), lse (B, H, M)."""
    torch.set_autocast_enabled("cpu", False)  # which the package does not follow
    per = [None] * len(q) if slopes is None else slopes.expand(len(q), -1)
    outs, lses = zip(*(one(*x, slopes=s, **shape) for *x, s in zip(q, k, v, per)))
    return torch.stack(outs), torch.stack(lses)


def packed(q, k, v, starts_q, starts_k, slopes=None, **shape):
    """`one` of each sequence of a pack: out (all, H, D_v), lse (H, all)."""
    per = [None] * len(starts_q) if slopes is None else slopes.expand(len(starts_q), -1)
    borders = zip(starts_q.tolist(), starts_q[1:].tolist(), starts_k.tolist(), starts_k[1:].tolist(), per)
    parts = [one(q[a:b], k[c:d], v[c:d], slopes=s, **shape) for a, b, c, d, s in borders]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], 1)


def _cached(q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, leftpad, table, **shape):
    """With new keys written into the cache, which has no pages then."""
    outs, lses = [], []
    lengths = torch.as_tensor(k_cache.shape[1] if cache_seqlens is None else cache_seqlens).expand(len(q))
    for b, length in enumerate(lengths.tolist()):
        row = b if cache_batch_idx is None else int(cache_batch_idx[b])
        if k is not None:
            k_cache[row, length : length + k.shape[1]] = k[b]
            v_cache[row, length : length + k.shape[1]] = v[b]
            length += k.shape[1]
        keys, values = (
            x[row] if table is None else x[table[b].long()].flatten(0, 1) for x in (k_cache, v_cache)
        )
        out, lse = one(
            q[b], keys[:length], values[:length], first=0 if leftpad is None else int(leftpad[b]), **shape
        )
        outs.append(out), lses.append(lse)
    return torch.stack(outs), torch.stack(lses)


def two():
    """The module `flash_attn`."""

    def result(pair, return_attn_probs):
        return (*pair, None) if return_attn_probs else pair[0]

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        shape = dict(causal=causal, window=window_size, softcap=softcap)
        return result(each(q, k, v, alibi_slopes, scale=softmax_scale, **shape), return_attn_probs)

    def flash_attn_qkvpacked_func(
        qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        shape = dict(causal=causal, window=window_size, softcap=softcap)
        return result(each(*qkv.unbind(2), alibi_slopes, scale=softmax_scale, **shape), return_attn_probs)

    def flash_attn_kvpacked_func(
        q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        shape = dict(causal=causal, window=window_size, softcap=softcap)
        return result(each(q, *kv.unbind(2), alibi_slopes, scale=softmax_scale, **shape), return_attn_probs)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        assert dropout_p == 0 and block_table is None
        shape = dict(causal=causal, window=window_size, softcap=softcap, scale=softmax_scale)
        return result(packed(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, **shape), return_attn_probs)

    def flash_attn_varlen_qkvpacked_func(
        qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
        softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        shape = dict(causal=causal, window=window_size, softcap=softcap, scale=softmax_scale)
        return result(
            packed(*qkv.unbind(1), cu_seqlens, cu_seqlens, alibi_slopes, **shape), return_attn_probs
        )

    def flash_attn_varlen_kvpacked_func(
        q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False,
    ):  # fmt: skip
        shape = dict(causal=causal, window=window_size, softcap=softcap, scale=softmax_scale)
        return result(
            packed(q, *kv.unbind(1), cu_seqlens_q, cu_seqlens_k, alibi_slopes, **shape), return_attn_probs
        )

    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
        cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
        return_softmax_lse=False,
    ):  # fmt: skip
        shape = dict(
            causal=causal, window=window_size, softcap=softcap, scale=softmax_scale, slopes=alibi_slopes
        )
        cache = cache_seqlens, cache_batch_idx, cache_leftpad, block_table
        pair = _cached(q, k_cache, v_cache, k, v, *cache, **shape)
        return pair if return_softmax_lse else pair[0]

    return module("flash_attn", **locals())


def three():
    """The module `flash_attn_interface`."""

    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        if qv is not None:
            q, k = torch.cat((q, qv), -1), torch.cat((k, v), -1)
        pair = each(q, k, v, scale=softmax_scale, causal=causal, window=window_size, softcap=softcap)
        return pair if return_attn_probs else pair[0]

    def flash_attn_qkvpacked_func(
        qkv, softmax_scale=None, causal=False, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, deterministic=False, num_heads_q=None,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        heads = (qkv.shape[2] - (num_heads_q or 0)) // 2
        parts = qkv.unbind(-3) if num_heads_q is None else qkv.split([num_heads_q, heads, heads], -2)
        pair = each(*parts, scale=softmax_scale, causal=causal, window=window_size, softcap=softcap)
        return pair if return_attn_probs else pair[0]

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        shape = dict(causal=causal, window=window_size, softcap=softcap, scale=softmax_scale)
        if seqused_k is not None:  # the keys of a sequence beyond these do not count
            keep = torch.cat([torch.arange(n) + a for a, n in zip(cu_seqlens_k.tolist(), seqused_k.tolist())])
            k, v = k[keep], v[keep]
            cu_seqlens_k = torch.nn.functional.pad(seqused_k.cumsum(0), (1, 0))
        pair = packed(q, k, v, cu_seqlens_q, cu_seqlens_k, **shape)
        return pair if return_attn_probs else pair[0]

    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
        cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
        max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None,
        softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
        rotary_interleaved=True, scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0,
        return_softmax_lse=False,
    ):  # fmt: skip
        shape = dict(causal=causal, window=window_size, softcap=softcap, scale=softmax_scale)
        cache = cache_seqlens, cache_batch_idx, cache_leftpad, page_table
        pair = _cached(q, k_cache, v_cache, k, v, *cache, **shape)
        return pair if return_softmax_lse else pair[0]

    return module("flash_attn_interface", **locals())


def four():
    """The module `flash_attn.cute`, whose functions always return a pair."""

    def flash_attn_func(
        q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
        learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
        score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
        block_sparse_tensors_bwd=None, return_lse=False,
    ):  # fmt: skip
        shape = dict(causal=causal, window=window_size, softcap=softcap, scale=softmax_scale)
        out, lse = each(q, k, v, sink=learnable_sink, **shape)
        return out, lse if return_lse or q.requires_grad else None

    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
        softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0,
        num_splits=1, pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None,
        block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False,
        scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False,
    ):  # fmt: skip
        shape = dict(causal=causal, window=window_size, softcap=softcap, scale=softmax_scale)
        out, lse = packed(q, k, v, cu_seqlens_q, cu_seqlens_k, sink=learnable_sink, **shape)
        return out, lse if return_lse or q.requires_grad else None

    return module("flash_attn.cute", **locals())


def module(name, **functions):
    """A module with these functions."""
    made = ModuleType(name)
    for function_name, function in functions.items():
        if function_name.startswith("flash"):
            function.__module__, function.__qualname__ = name, function_name
            setattr(made, function_name, function)
    return made


def put_in_place(monkeypatch):
    """The three modules, importable until the test ends."""
    made = {library.__name__: library for library in (two(), three(), four())}
    made["flash_attn"].cute = made["flash_attn.cute"]
    made["flash_attn"].__path__ = []
    for name, library in made.items():
        monkeypatch.setitem(sys.modules, name, library)
    return made
