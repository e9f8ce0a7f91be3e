"""`check` with a sample, of models whose attention is caught at its softmax or otherwise."""

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from hnf_attention import check_attention_stability  # noqa: E402

TEXT = dict(vocab_size=50, bos_token_id=1, eos_token_id=2, pad_token_id=0)
SIZES = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
WINDOWS = dict(image_size=32, patch_size=4, embed_dim=32, depths=[1, 1], num_heads=[2, 4], window_size=4)
SPEECH = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4)
IDS = torch.randint(3, 50, (2, 48), generator=torch.Generator().manual_seed(0))
PICTURES = {"pixel_values": torch.randn(2, 3, 32, 32)}
BOTH = {"input_ids": IDS, "decoder_input_ids": IDS}
SOUND = {"input_features": torch.randn(2, 80, 100), "decoder_input_ids": IDS}
AT_THE_SOFTMAX = {
    "bloom": dict(hidden_size=64, n_layer=2, n_head=4),
    "mpt": dict(d_model=64, n_layers=2, n_heads=4, max_seq_len=64),
    "deberta": SIZES,
    "deberta-v2": SIZES,
    "gpt_neo": dict(
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]],
        window_size=16,
    ),
}
OTHERS = {
    "t5": (TEXT | dict(d_model=64, d_kv=16, num_layers=2, num_heads=4, d_ff=64), BOTH),
    "xlnet": (TEXT | dict(d_model=64, n_layer=2, n_head=4, d_inner=64), IDS),
    "vit": (SIZES | dict(image_size=32, patch_size=4), PICTURES),
    "clip_vision_model": (SIZES | dict(image_size=32, patch_size=4), PICTURES),
    "whisper": (TEXT | SPEECH | dict(d_model=64, max_source_positions=50, decoder_start_token_id=1), SOUND),
    "big_bird": (TEXT | SIZES | dict(attention_type="original_full"), IDS),
}


def build(family, options):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **options)
    return transformers.AutoModel.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("family", AT_THE_SOFTMAX)
def test_attention_that_is_caught_at_its_softmax_is_measured(family):
    model = build(family, TEXT | AT_THE_SOFTMAX[family])
    report = check_attention_stability(model, IDS, seq_len=48)
    assert report["sources"]["sigma_ratio"] == "measured" and len(report["layers"]) == 2
    with torch.no_grad():
        weights = model(IDS, output_attentions=True).attentions
    for layer, rows in zip(report["layers"], weights, strict=True):
        rows = rows.double()
        seen = rows > 0
        scores = torch.where(seen, rows.clamp(min=1e-300).log(), 0.0)
        count = seen.sum(-1, keepdim=True)
        mean = scores.sum(-1, keepdim=True) / count
        square = (torch.where(seen, scores - mean, 0.0).square() / count).sum(-1)
        judged = count[0, 0, :, 0] >= 16
        heads = square[:, :, judged].mean((0, 2)).sqrt()
        assert layer["score_std"] == pytest.approx(float(heads.median()), rel=1e-3)


@pytest.mark.parametrize("family", OTHERS)
def test_samples_of_other_families_are_measured(family):
    options, sample = OTHERS[family]
    report = check_attention_stability(build(family, options), sample, seq_len=48)
    assert report["sources"]["sigma_ratio"] == "measured" and report["verdict"] != "not known"


def test_formats_are_not_judged_if_only_the_scores_are_known_and_the_class_is_not():
    report = check_attention_stability(build("bloom", TEXT | AT_THE_SOFTMAX["bloom"]), IDS, seq_len=48)
    assert report["notes"][0].startswith("number formats are not judged: positions add to its scores")
    assert report["float16_safe"] is None and report["verdict"] != "not known"


def test_a_sample_that_is_not_measured_leaves_what_is_not_known():
    options = TEXT | SIZES | dict(attention_window=[16, 16], max_position_embeddings=70)
    report = check_attention_stability(build("longformer", options), IDS, seq_len=48)
    assert report["verdict"] == "not known" and "measured" not in report["sources"]["sigma_ratio"]


def test_attention_in_windows_needs_the_numbers_of_a_stage():
    model = build("swin", WINDOWS)
    with pytest.raises(ValueError, match=r"n_heads to be an integer of at least 1, got \[2, 4\]"):
        check_attention_stability(model, PICTURES, seq_len=16)
    report = check_attention_stability(model, PICTURES, {"d_model": 32, "n_heads": 2, "seq_len": 16})
    assert report["sources"]["sigma_ratio"] == "measured"


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = 4, 16
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x):
        layers = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (layer(x).unflatten(-1, (4, 16)).transpose(1, 2) for layer in layers)
        return ((q @ k.transpose(-1, -2) / 4).softmax(-1) @ v).transpose(1, 2).flatten(2)


def test_attention_of_ones_own_is_measured():
    numbers = {"d_model": 64, "n_heads": 4, "seq_len": 48}
    report = check_attention_stability(nn.Sequential(SelfAttention()), torch.randn(2, 48, 64), numbers)
    assert report["sources"]["sigma_ratio"] == "measured" and report["layers"][0]["layer"] == "0"
