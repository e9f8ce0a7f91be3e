"""Calls of flex_attention, and the oracle that their measurements are held to."""

import torch
from sinks import sink_mass
from torch.nn.attention import flex_attention as flex


def causal(b, h, i, j):
    return i >= j


def document(b, h, i, j):
    """Of its own batch element: 7, 14, ... keys long."""
    return i // (7 * (b + 1)) == j // (7 * (b + 1))


def alibi(score, b, h, i, j):
    return score - (i - j).abs() * 0.5 ** (h + 1)


def bent(score, b, h, i, j):
    return torch.where(i >= j, 3.0 * torch.tanh(score / 3.0), -torch.inf)


TABLE = torch.randn(4, 30, 26, generator=torch.Generator().manual_seed(1))


def from_table(score, b, h, i, j):
    return score + TABLE[h, i, j]


def tensors(kv_heads=4):
    generator = torch.Generator().manual_seed(2)
    shapes = (4, 30), (kv_heads, 26), (kv_heads, 26)
    return [2 * torch.randn(2, heads, rows, 8, generator=generator) for heads, rows in shapes]


def block_mask(mask_mod):
    return flex.create_block_mask(mask_mod, 2, None, 30, 26, device="cpu", BLOCK_SIZE=16)


def statistics(query, key, score_mod=None, mask_mod=None, scale=None):
    """The oracle: fp64, all places at once, the functions broadcast by hand."""
    batch, heads, rows, width = query.shape
    b, h, i, j = torch.meshgrid(*(torch.arange(n) for n in (batch, heads, rows, key.shape[2])), indexing="ij")
    key = key.repeat_interleave(heads // key.shape[1], 1)
    s = query.double() @ key.double().mT * (width**-0.5 if scale is None else scale)
    s = s if score_mod is None else score_mod(s, b, h, i, j).double()
    s = s if mask_mod is None else s.masked_fill(~mask_mod(b, h, i, j), -torch.inf)
    visible = s > -torch.inf
    lse = s.logsumexp(-1)
    entropy = torch.special.entr((s - lse[..., None]).exp().nan_to_num()).sum(-1)
    sink = sink_mass((s - lse[..., None]).exp().nan_to_num(), visible)
    return lse, entropy, s.amax(-1), s.masked_fill(~visible, torch.inf).amin(-1), visible.sum(-1), sink


def check(measurement, expected, rows=None):
    r = measurement.rows
    got = r.lse, r.entropy, r.max_logit, r.min_logit, measurement.visible_keys, measurement.sink_mass
    # Which key the rows share is asked of the sampled ones.
    for ours, theirs in zip(got if rows is None else got[:-1], expected):
        theirs = theirs if rows is None else theirs.gather(2, rows.clamp(min=0))
        ours, theirs = ours.expand(theirs.shape).double(), theirs.double()
        real = slice(None) if rows is None else rows >= 0
        torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=1e-5)


CASES = {
    "plain": (None, None),
    "mask": (None, document),
    "scores": (alibi, None),
    "both": (alibi, document),
    "hidden by the scores": (bent, None),
    "table": (from_table, causal),
}
