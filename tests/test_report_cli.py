"""`hnf-attention report`: a run log becomes a file, the verdict an exit code."""

import json

import pytest
from heads import snapshot

from hnf_attention.cli.main import main
from hnf_attention.diagnosis import diagnose
from hnf_attention.run_log import RunLogWriter


def log_of(path, **layer):
    writer = RunLogWriter(path)
    writer.write(diagnose([snapshot(10, a=layer)]))
    writer.close()
    return path


def test_a_report_is_written_and_its_verdict_is_said(tmp_path, capsys):
    healthy, out = log_of(tmp_path / "run.db"), tmp_path / "page.html"
    assert main(["report", str(healthy), "-o", str(out), "--title", "A <b>", "--metric", "key_norm"]) == 0
    text = out.read_text(encoding="utf-8")
    assert "<h1>A &lt;b&gt;</h1>" in text and "plane-0-key_norm" in text and "plane-0-entropy" not in text
    said = capsys.readouterr().out
    assert said.startswith("healthy Attention is healthy up to step 10") and str(out) in said.replace(
        "\n", ""
    )


def test_two_runs_of_which_one_fails_give_code_1(tmp_path, capsys):
    paths = [log_of(tmp_path / "a.db"), log_of(tmp_path / "b.db", nonfinite_rows=3.0, nonfinite_out=3.0)]
    out = tmp_path / "page.html"
    assert (
        main(
            ["report", *map(str, paths), "-o", str(out), "--name", "first", "--name", "second", "--json", "-"]
        )
        == 1
    )
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert [run["status"] for run in found["runs"]] == ["healthy", "failed"] and found["report"] == str(out)
    assert "This run failed: NaN or inf in a began at step 10" in " ".join(printed.err.split())
    assert "<title>first and second</title>" in out.read_text(encoding="utf-8")


def test_a_dash_is_standard_output_and_no_file(tmp_path, monkeypatch, capsysbinary):
    monkeypatch.chdir(tmp_path)
    log_of(tmp_path / "run.db")
    assert main(["report", "run.db", "-o", "-", "--title", "π"]) == 0
    written = capsysbinary.readouterr()
    assert written.out.decode().startswith("<!doctype html>") and "π" in written.out.decode()
    assert b"healthy" in written.err and b"standard output (" in written.err
    assert not (tmp_path / "-").exists() and not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.db"], "cannot read the run log missing.db: No such file"),
        (["text.txt"], "expected a run log, got"),
        (["run.db", "-o", "run.db"], "expected --out to be another file than the one that is read"),
        (["run.db", "--json", "run.db"], "expected --json to be another file than the one that is read"),
        (
            ["run.db", "-o", "-", "--json", "-"],
            "expected --out and --json in two places, got standard output",
        ),
        (
            ["run.db", "-o", "a.html", "--json", "./a.html"],
            "expected --out and --json in two places, got a.html",
        ),
        (["run.db", "-o", "no/such/page.html"], "expected --out in an existing folder"),
        (["run.db", "run.db", "run.db"], "expected one or two run logs, got 3"),
        (["run.db", "--metric", "nonsense"], "expected metrics among"),
        (["run.db", "--name", "a", "--name", "b"], "expected one name for each of 1 runs, got 2"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    log_of(tmp_path / "run.db")
    (tmp_path / "text.txt").write_text("no database, but long enough to be one" * 40)
    before = (tmp_path / "run.db").read_bytes()
    assert main(["report", *arguments]) == 2
    found = capsys.readouterr().err
    assert said in found and found.count("\n") == 1
    assert (tmp_path / "run.db").read_bytes() == before and not (tmp_path / "report.html").exists()
