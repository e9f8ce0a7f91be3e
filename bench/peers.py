"""Everything that attention is timed beside: name -> function(q, k, v, is_causal) -> tuple of tensors.

The first tensor is the output, except for a probe, which has statistics only. Grouped-query heads are
taken from the shapes. A peer that the installed PyTorch or this card lacks is not in `PEERS`; one that
does not take a certain call raises `Unavailable`, or SDPA's own "No available kernel", for it.
"""

import functools

import torch
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hnf_attention import attention, attention_stats
from hnf_attention.engine import engines
from hnf_attention.engine.call import Call, check
from hnf_attention.engine.card import card_of

PERIOD = 16  # "probe 1/16"
EAGER_LIMIT = 32e9  # bytes: the eager peer's N x N matrices beyond this are not worth a card's memory
# At the forward's peak: scores in bf16 (2), weights in fp32 (4), p log p (4), weights for the product (2)
# and one passing copy of the scores (2). The backward holds both weights and two gradients of each.
EAGER_BYTES, EAGER_BYTES_TRAINING = 14, 22


class Unavailable(RuntimeError):
    """This peer does not compute this call; says why."""


def sdpa(q, k, v, is_causal):
    grouped = q.shape[1] != k.shape[1]
    return (scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=grouped),)


def _sdpa_by(backend):
    def run(q, k, v, is_causal):
        with sdpa_kernel(backend):
            return sdpa(q, k, v, is_causal)

    return run


def eager(q, k, v, is_causal):
    """What shows the weights today: the whole score matrix, softmax in fp32, statistics from the weights."""
    elements = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    size = elements * (EAGER_BYTES_TRAINING if q.requires_grad else EAGER_BYTES)
    if size > EAGER_LIMIT:
        raise Unavailable(f"eager attention would need about {size / 1e9:.0f} GB for its N x N matrices")
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v)) if group > 1 else (k, v)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    weights = torch.softmax(scores, -1, dtype=torch.float32)
    del scores
    seen = weights.detach()
    entropy, max_weight = torch.special.entr(seen).sum(-1), seen.amax(-1)
    return weights.to(q.dtype) @ v, entropy, max_weight


def _causal(b, h, q_index, k_index):
    return q_index >= k_index


@functools.lru_cache(maxsize=4)
def _block_mask(num_queries, num_keys, device):
    return flex_attention.create_block_mask(_causal, None, None, num_queries, num_keys, device=device)


@functools.lru_cache(maxsize=1)
def _compiled_flex(*shape_class):
    """Compiled for one shape alone, as fast as it gets; cases come in order, so that each compiles once.

    Starting afresh for every shape keeps clear of the limit on recompilations, behind which FlexAttention
    would go on uncompiled; fullgraph makes an error of what is left of that.
    """
    torch.compiler.reset()
    return torch.compile(flex_attention.flex_attention, dynamic=False, fullgraph=True)


def _flex(q, k, v, is_causal, **auxiliary):
    mask = _block_mask(q.shape[2], k.shape[2], q.device) if is_causal else None
    compiled = _compiled_flex(q.shape, k.shape, q.requires_grad, is_causal)
    result = compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1], **auxiliary)
    return (result[0], *result[1]) if auxiliary else (result,)


def _flex_with_statistics(q, k, v, is_causal):
    auxiliary = flex_attention.AuxRequest(lse=True, max_scores=True)
    return _flex(q, k, v, is_causal, return_aux=auxiliary)


def _ours(extended):
    def run(q, k, v, is_causal):
        out, rows = attention(q, k, v, is_causal=is_causal, extended=extended)
        return out, rows.entropy

    return run


def _lse_only(q, k, v, is_causal):
    """Our forward with everything but lse compiled out, where the Hopper kernel computes it."""
    from hnf_attention.kernels.hopper import host

    options = check(
        q, k, v, attn_mask=None, is_causal=is_causal, scale=None, window_size=None, softcap=None, sinks=None
    )
    reason = engines.hopper_supports(Call(q, k, v, options), card_of(q.device))
    if reason is not None:
        raise Unavailable(f"only the Hopper kernel is compiled without statistics: {reason}")
    ragged = k.shape[2] % host.BLOCK_N > 0
    halves = is_causal and q.shape[2] <= k.shape[2], False
    plan = host.plan(q.shape[3], v.shape[3], is_causal, ragged, False, halves=halves)
    return host.forward(q, k, v, options, plan)[:2]


def _probe(sample):
    def run(q, k, v, is_causal):
        return (attention_stats(q, k, is_causal=is_causal, sample=sample).entropy,)

    return run


def _peers():
    yield "sdpa default", sdpa
    yield "ours", _ours(extended=False)
    cuda = torch.cuda.is_available()
    if cuda and torch.backends.cudnn.is_available():
        yield "sdpa cudnn", _sdpa_by(SDPBackend.CUDNN_ATTENTION)
    if cuda and torch.backends.cuda.is_flash_attention_available():
        yield "sdpa flash", _sdpa_by(SDPBackend.FLASH_ATTENTION)
    if cuda and engines.hopper_runs_on(card_of(torch.device("cuda", 0))) is None:
        yield "ours, lse only", _lse_only
    yield "ours, extended", _ours(extended=True)
    yield "probe all", _probe(None)
    yield "probe 1/16", _probe((PERIOD, 3))
    if cuda:  # on a CPU it would compile C++ for minutes
        yield "flex", _flex
        if hasattr(flex_attention, "AuxRequest"):  # torch >= 2.9
            yield "flex with lse and max", _flex_with_statistics
    yield "eager with weights", eager


PEERS = dict(_peers())
CORE = ("sdpa default", "ours", "sdpa cudnn", "sdpa flash", "ours, lse only")  # timed at every case
