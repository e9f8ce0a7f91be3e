"""Stand-ins for FlashAttention 2, 3 and 4, with the signatures of the public source (2.8.4, August 2026).

They compute in plain PyTorch, sequence by sequence, as the package's documentation says: causal masks and windows are
aligned to the bottom right. Nothing here uses hnf_attention.
"""

import inspect
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
    """With new keys written into the cache."""
    outs, lses = [], []
    lengths = torch.as_tensor(k_cache.shape[1] if cache_seqlens is None else cache_seqlens).expand(len(q))
    for b, length in enumerate(lengths.tolist()):
        row = b if cache_batch_idx is None else int(cache_batch_idx[b])
        for new in range(0 if k is None else k.shape[1]):
            size, place = k_cache.shape[1], (row, length)
            if table is not None:
                place = int(table[b, length // size]), length % size
            k_cache[place], v_cache[place] = k[b, new], v[b, new]
            length += 1
        keys, values = (
            x[row] if table is None else x[table[b].long()].flatten(0, 1) for x in (k_cache, v_cache)
        )
        out, lse = one(
            q[b], keys[:length], values[:length], first=0 if leftpad is None else int(leftpad[b]), **shape
        )
        outs.append(out), lses.append(lse)
    return torch.stack(outs), torch.stack(lses)


TAIL = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
)
TAIL += "deterministic=False, return_attn_probs=False"
BORDERS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
CACHE = "q, k_cache, v_cache, k=None, v=None, {}rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
CACHE += "cache_batch_idx=None, cache_leftpad=None, "
SCALES = "q_descale=None, k_descale=None, v_descale=None, "
THIRD = "window_size=(-1, -1), attention_chunk=0, softcap=0.0, "
FOURTH = "softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, "
FOURTH += "pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None, "
PACKS = "num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False"
#: The parameters of each function, by module.
SIGNATURES = {
    "flash_attn": {
        "flash_attn_func": f"q, k, v, {TAIL}",
        "flash_attn_qkvpacked_func": f"qkv, {TAIL}",
        "flash_attn_kvpacked_func": f"q, kv, {TAIL}",
        "flash_attn_varlen_func": f"q, k, v, {BORDERS}, {TAIL}, block_table=None",
        "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {TAIL}",
        "flash_attn_varlen_kvpacked_func": f"q, kv, {BORDERS}, {TAIL}",
        "flash_attn_with_kvcache": CACHE.format("")
        + "block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False",
    },
    "flash_attn_interface": {
        "flash_attn_func": f"q, k, v, softmax_scale=None, causal=False, qv=None, {SCALES}{THIRD}{PACKS}",
        "flash_attn_qkvpacked_func": f"qkv, softmax_scale=None, causal=False, {SCALES}{THIRD}deterministic=False, "
        "num_heads_q=None, sm_margin=0, return_attn_probs=False",
        "flash_attn_varlen_func": f"q, k, v, {BORDERS}, seqused_q=None, seqused_k=None, softmax_scale=None, "
        f"causal=False, qv=None, {SCALES}{THIRD}{PACKS}",
        "flash_attn_with_kvcache": CACHE.format("qv=None, ")
        + "page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None, "
        f"{SCALES}softmax_scale=None, causal=False, {THIRD}rotary_interleaved=True, scheduler_metadata=None, "
        "num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False",
    },
    "flash_attn.cute": {
        "flash_attn_func": f"q, k, v, qv=None, gather_kv_indices=None, {FOURTH}aux_tensors=None, aux_scalars=None, "
        "block_sparse_tensors=None, block_sparse_tensors_bwd=None, return_lse=False",
        "flash_attn_varlen_func": "q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, "
        "max_seqlen_k=None, min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, "
        f"page_table=None, {FOURTH}block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False, "
        "scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False",
    },
}


def compute(given):
    """(out, lse) of a call, from its arguments by name."""
    assert not given.get("dropout_p")
    if given.get("q", given.get("qkv")).dtype == torch.float8_e4m3fn:
        out, lse = compute(given | dequantised(given))
        return out.bfloat16(), lse
    words = {
        "scale": "softmax_scale",
        "window": "window_size",
        "sink": "learnable_sink",
        "slopes": "alibi_slopes",
    }
    shape = {name: given[word] for name, word in words.items() if given.get(word) is not None}
    shape |= {"causal": given["causal"], "softcap": given["softcap"]}
    if "k_cache" in given:
        table = given.get("block_table") if "block_table" in given else given["page_table"]
        where = [given[name] for name in ("cache_seqlens", "cache_batch_idx", "cache_leftpad")]
        return _cached(
            *(given[name] for name in ("q", "k_cache", "v_cache", "k", "v")), *where, table, **shape
        )
    starts = (
        given.get("cu_seqlens_q", given.get("cu_seqlens")),
        given.get("cu_seqlens_k", given.get("cu_seqlens")),
    )
    q, k, v = parts_of(given)
    if given.get("qv") is not None:
        q, k = torch.cat((q, given["qv"]), -1), torch.cat((k, v), -1)
    if starts[0] is None:
        return each(q, k, v, **shape)
    if given.get("seqused_k") is not None:  # the keys of a sequence beyond these do not count
        used = given["seqused_k"].tolist()
        keep = torch.cat([torch.arange(n) + a for a, n in zip(starts[1].tolist(), used)])
        k, v, starts = k[keep], v[keep], (starts[0], torch.tensor([0, *used]).cumsum(0))
    return packed(q, k, v, *starts, **shape)


def dequantised(given):
    """The 8-bit tensors of a call times their scales (sequences, key heads), fp32; pages as one cache a sequence."""
    names = [x for x in ("q", "k", "v", "qkv", "k_cache", "v_cache") if given.get(x) is not None]
    copies = {name: given[name].float() for name in names}
    if given.get("page_table") is not None:
        pages = given["page_table"].long()
        copies |= {name: copies[name][pages].flatten(1, 2) for name in ("k_cache", "v_cache")}
    starts = (
        given.get("cu_seqlens_q", given.get("cu_seqlens")),
        given.get("cu_seqlens_k", given.get("cu_seqlens")),
    )
    views = (
        dict(zip("qkv", parts_of(copies | {"num_heads_q": given.get("num_heads_q")})))
        if "qkv" in copies
        else copies
    )
    for name, tensor in views.items():
        descale, borders = given[f"{name[0]}_descale"], starts[name[0] != "q"]
        for sequence in range(0 if descale is None else len(descale)):
            of_heads = descale[sequence].repeat_interleave(tensor.shape[-2] // descale.shape[1])[:, None]
            if borders is None:
                tensor[sequence] *= of_heads
            else:
                tensor[borders[sequence] : borders[sequence + 1]] *= of_heads
    return copies | dict.fromkeys(("q_descale", "k_descale", "v_descale", "page_table"))


def parts_of(given):
    """Queries, keys and values of a call."""
    if "qkv" in given and given.get("num_heads_q") is not None:
        heads = (given["qkv"].shape[-2] - given["num_heads_q"]) // 2
        return given["qkv"].split([given["num_heads_q"], heads, heads], -2)
    if "qkv" in given:
        return given["qkv"].unbind(-3)
    return (given["q"], *given["kv"].unbind(-3)) if "kv" in given else (given["q"], given["k"], given["v"])


def module_of(name):
    """A module with the functions of one version. Those of FlashAttention 4 always return a pair."""
    made = ModuleType(name)

    def add(function_name, parameters):
        signature = inspect.signature(eval(f"lambda {parameters}: None"))

        def function(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments
            out, lse = compute(given)
            if name == "flash_attn.cute":
                return out, lse if given["return_lse"] or given["q"].requires_grad else None
            if given.get("return_softmax_lse"):
                return out, lse
            if not given.get("return_attn_probs"):
                return out
            return (out, lse, None) if name == "flash_attn" else (out, lse)

        function.__module__, function.__name__, function.__qualname__ = name, function_name, function_name
        function.__signature__ = signature
        setattr(made, function_name, function)

    for function_name, parameters in SIGNATURES[name].items():
        add(function_name, parameters)
    return made


def put_in_place(monkeypatch):
    """The three modules, importable until the test ends."""
    made = {name: module_of(name) for name in SIGNATURES}
    made["flash_attn"].cute = made["flash_attn.cute"]
    made["flash_attn"].__path__ = []
    for name, library in made.items():
        monkeypatch.setitem(sys.modules, name, library)
    return made
