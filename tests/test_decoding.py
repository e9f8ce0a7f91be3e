"""GroupedQueryAttention with a cache: tokens one by one, and in chunks, against the whole sequence."""

import pytest
import torch

from hnf_attention import instrument
from hnf_attention.nn import GroupedQueryAttention, QKNorm, Rope

B, M, E, H, H_KV, D = 2, 11, 24, 6, 2, 8
OPTIONS = {
    "plain": {},
    "window, soft-cap": {"window_size": 4, "softcap": 2.0, "qk_norm": QKNorm()},
    "window, sinks": {"window_size": 3, "sinks": True, "bias": True, "rope": Rope(dim=4)},
}
FIELDS = ("lse", "entropy", "max_logit", "min_logit")


class Pairs:
    """The least that a cache has to have."""

    def __init__(self):
        self.pairs = {}

    def get_seq_length(self, layer_idx):
        return self.pairs[layer_idx][0].shape[2] if layer_idx in self.pairs else 0

    def update(self, key, value, layer_idx):
        old = self.pairs.get(layer_idx)
        self.pairs[layer_idx] = (key, value) if old is None else tuple(map(both, old, (key, value)))
        return self.pairs[layer_idx]


def both(old, new):
    return torch.cat([old, new], 2)


def config(window):
    transformers = pytest.importorskip("transformers", minversion="5")
    sizes = {"hidden_size": E, "num_attention_heads": H, "num_key_value_heads": H_KV, "head_dim": D}
    return transformers.MistralConfig(**sizes, num_hidden_layers=2, sliding_window=window)


def cache(kind, window):
    """A cache of two layers. "sliding" and "static" keep no more than a window of keys, if there is one."""
    if kind == "pairs":
        return Pairs()
    transformers = pytest.importorskip("transformers", minversion="5")
    if kind == "static":
        return transformers.StaticCache(config=config(window), max_cache_len=M + 2)
    return (
        transformers.DynamicCache(config=config(window)) if kind == "sliding" else transformers.DynamicCache()
    )


def layer(options):
    torch.manual_seed(0)
    made = GroupedQueryAttention(E, H, H_KV, head_dim=D, **options).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def decode(attention, x, kept, sizes, **given):
    """The output of x in pieces of these sizes, and the row statistics of each."""
    outputs, rows = [], []
    for piece in x.split(sizes, 1):
        outputs.append(attention(piece, past_key_values=kept, layer_idx=1, **given))
        rows.append(attention.row_stats)
    return torch.cat(outputs, 1), rows


QUICK = [("pairs", "plain"), ("sliding", "window, soft-cap"), ("static", "window, sinks")]
ALL = [
    pytest.param(kind, name, marks=[] if (kind, name) in QUICK else pytest.mark.slow)
    for kind in ("pairs", "dynamic", "sliding", "static")
    for name in OPTIONS
]


@pytest.mark.parametrize("kind, name", ALL)
def test_tokens_and_chunks_give_the_whole_sequence(kind, name):
    attention = layer(OPTIONS[name])
    x = torch.randn(B, M, E, dtype=torch.float64)
    whole = attention(x)
    wanted = attention.row_stats
    for sizes in ([1] * M, [5, 1, 3, 2], [M]):
        out, rows = decode(attention, x, cache(kind, attention.window_size), sizes)
        torch.testing.assert_close(out, whole)
        for field in FIELDS:
            found = torch.cat([getattr(one, field) for one in rows], 2)
            torch.testing.assert_close(found, getattr(wanted, field), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("additive", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_padding_on_the_left_is_hidden_from_later_tokens(additive):
    attention = layer(OPTIONS["window, soft-cap"])
    x = torch.randn(B, M, E, dtype=torch.float64)
    kept = torch.ones(B, M, dtype=torch.bool)
    kept[0, :3] = False
    mask = kept[:, None, None]
    if additive:
        mask = torch.zeros(B, 1, 1, M).masked_fill(~mask, -torch.inf)
    whole = attention(x, mask)
    pieces, start = Pairs(), 0
    for size in (6, 1, 1, 3):
        end = start + size
        out = attention(x[:, start:end], mask[..., :end], past_key_values=pieces)
        torch.testing.assert_close(out, whole[:, start:end])
        start = end


def test_a_monitored_decoder_counts_the_keys_of_new_tokens():
    attention = layer(OPTIONS["plain"])
    model = torch.nn.Sequential(attention)
    kept, seen = Pairs(), []
    with torch.no_grad(), instrument(model, strict=True) as handle:
        handle.on_measure = lambda measurement: seen.append(measurement.visible_keys)
        for piece in torch.randn(B, M, E, dtype=torch.float64).split([6, 1, 4], 1):
            attention(piece, past_key_values=kept)
        assert list(handle.coverage.measured) == ["0"]
    counts = torch.cat([keys.expand(B, H, keys.shape[-1]) for keys in seen], 2)
    assert torch.equal(counts, (torch.arange(M) + 1).expand(B, H, M))


def test_all_keys_of_an_encoder_are_seen_but_unused_places():
    attention = layer(OPTIONS["plain"])
    x = torch.randn(B, M, E, dtype=torch.float64)
    kept = cache("static", None)
    attention(x[:, :4], past_key_values=kept, is_causal=False)
    out = attention(x[:, 4:], past_key_values=kept, is_causal=False)
    torch.testing.assert_close(out, attention(x, is_causal=False)[:, 4:])


@pytest.mark.parametrize("shape", [(1, 7), (2, 9), (B, 1, 1, 3), (1, 2)])
@pytest.mark.parametrize("new", [1, 3])
def test_a_mask_of_another_length_is_refused(shape, new):
    attention, kept, x = layer(OPTIONS["window, sinks"]), Pairs(), torch.randn(B, 8 + new, E).double()
    attention(x[:, :8], past_key_values=kept)
    with pytest.raises(ValueError, match=rf"\(M, N\) = \({new}, {8 + new}\).*got \({shape[0]}, "):
        attention(x[:, 8:], torch.ones(shape, dtype=torch.bool), past_key_values=kept)


def test_a_mask_of_integers_is_refused_and_one_without_dimensions_taken():
    attention, x = layer(OPTIONS["plain"]), torch.randn(B, M, E).double()
    for new in (1, 3):
        kept = Pairs()
        attention(x[:, : M - new], past_key_values=kept)
        with pytest.raises(TypeError, match="got torch.int64"):
            attention(x[:, -new:], torch.ones(B, 1, 1, M, dtype=torch.int64), past_key_values=kept)
        kept = Pairs()
        attention(x[:, : M - new], past_key_values=kept)
        out = attention(x[:, -new:], torch.tensor(True), past_key_values=kept)
        torch.testing.assert_close(out, attention(x)[:, -new:])


def test_what_is_no_cache_is_refused():
    x = torch.randn(B, M, E)
    with pytest.raises(TypeError, match="past_key_values with `get_seq_length` and `update`.*got tuple"):
        GroupedQueryAttention(E, H)(x, past_key_values=(x, x))
