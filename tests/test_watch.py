"""A run log in a terminal, and as a file for other programs."""

import io
import json
import math

import numpy as np
import pytest
from heads import head_stats
from rich.console import Console

from hnf_attention.cli.main import main
from hnf_attention.cli.terminal import LEVELS, Watched, view
from hnf_attention.diagnosis import AttentionDiagnosis, diagnose
from hnf_attention.run_log import RunLog, RunLogWriter
from hnf_attention.run_log.metrics import METRICS, NAMES
from hnf_attention.statistics.heads import Snapshot

METRIC = METRICS[NAMES.index("logit_range_max")]
HOSTILE = "layers.1.\x1b[2J<script>alert(1)</script>"


def run_of(path, steps=12, layers=4, heads=6, hot=(2, 5), name="layers.{}.attn"):
    """A run in which one head's scores grow, and another head's become NaN at the end."""
    out, history = RunLogWriter(path), []
    for step in range(10, 10 * steps + 10, 10):
        found = {}
        for layer in range(layers):
            scores = np.full(heads, 4.0)
            if layer == hot[0]:
                scores[hot[1]] = 4.0 * math.exp(step / 20)
            if layer == 0 and step == 10 * steps:
                scores[0] = np.nan
            found[name.format(layer)] = head_stats(heads, max_logit=scores)
        history.append(Snapshot(step, found))
        for each in range(step - 9, step + 1):
            out.note(each, loss=5 - each / 40)
        if step == 60:
            out.event(step, "intervention", action="qk_clip")
        out.write(diagnose(history))
    out.close()
    return path


def lines_of(path, width, height=None, metric=METRIC):
    with RunLog(path) as log:
        watched = Watched(metric)
        watched.update(log)
        screen = Console(file=io.StringIO(), width=width, color_system=None)
        screen.print(view(watched, width, height))
    return screen.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 200])
def test_every_head_is_a_cell_and_the_failing_one_stands_out(tmp_path, width):
    lines = lines_of(run_of(tmp_path / "run.db"), width)
    assert all(len(line) <= width for line in lines)
    assert "step 120, 4 layers, 24 heads" in lines[0]
    rows = {line.split()[0]: "".join(line.split()[1:]) for line in lines[4:8]}
    assert list(rows) == ["0", "1", "2", "3"]  # what all names have in common is left out
    assert rows["2"][-1] == LEVELS[-1] and set(rows["1"]) == {LEVELS[0]}
    assert rows["0"][0] == "×"
    assert lines[1].startswith(f"worst head  {LEVELS[0]}") and lines[2].startswith(
        f"loss        {LEVELS[-1]}"
    )
    assert any("intervention: action qk_clip" in line for line in lines)
    assert any("layer 2 head 5: scores range" in line for line in lines)


def test_many_layers_and_heads_share_cells_and_the_worst_speaks(tmp_path):
    out = RunLogWriter(tmp_path / "run.db")
    scores = np.full((126, 128), 4.0)
    scores[77, 101] = 4000.0
    stats = {f"h.{n}": head_stats(128, max_logit=row) for n, row in enumerate(scores)}
    out.write(AttentionDiagnosis([], stats, 1))
    out.close()
    lines = lines_of(tmp_path / "run.db", 80, 30)
    assert len(lines) <= 30 and all(len(line) <= 80 for line in lines)
    (row,) = [line for line in lines[3:] if LEVELS[-1] in line]
    first, last = (int(word) for word in row[:12].split("to"))
    assert first <= 77 <= last and row.count(LEVELS[-1]) == 1


def test_low_numbers_are_the_worst_where_low_is_bad(tmp_path):
    metric = METRICS[NAMES.index("normalized_entropy")]
    out = RunLogWriter(tmp_path / "run.db")
    out.write(AttentionDiagnosis([], {"a": head_stats(2, normalized_entropy=[0.9, 0.1])}, 1))
    out.close()
    assert lines_of(tmp_path / "run.db", 80, metric=metric)[1].endswith("0.1")


@pytest.mark.parametrize(
    ("numbers", "legend"),
    [
        ([np.nan, np.nan], "no number"),
        ([4.0, np.nan], f"{LEVELS[4]} 4 nats"),
        ([4.0, 5.0], f"{LEVELS[0]} 4 to {LEVELS[-1]} 5 nats"),
    ],
)
def test_the_legend_has_the_numbers_that_there_are(tmp_path, numbers, legend):
    out = RunLogWriter(tmp_path / "run.db")
    out.write(AttentionDiagnosis([], {"a": head_stats(2, max_logit=numbers, min_logit=0.0)}, 1))
    out.close()
    lines = lines_of(tmp_path / "run.db", 80)
    assert lines[2] == f"range of a row's scores, largest: {legend}"
    assert [line[12] for line in lines if line.startswith("a ")] == [legend[0] if "nats" in legend else "×"]


def test_names_from_a_file_reach_no_terminal_as_they_are(tmp_path):
    path = run_of(tmp_path / "run.db", name=HOSTILE + "{}")
    assert not any("\x1b" in line for line in lines_of(path, 120))


def test_a_run_that_grows_is_followed(tmp_path):
    out = RunLogWriter(tmp_path / "run.db")
    with RunLog(tmp_path / "run.db") as log:
        watched = Watched(METRIC)
        watched.update(log)
        assert watched.verdict == "no log step yet"
        for step in (10, 20, 30, 20):  # resumed at last
            out.write(AttentionDiagnosis([], {"a": head_stats(2, max_logit=step)}, step))
            assert out.flush()
            watched.update(log)
        assert watched.steps == [10, 20] and watched.verdict == "no issues"
    out.close()


@pytest.mark.parametrize("steps", [(20, 30), (20, 30, 40), (15, 25)])
def test_steps_that_a_resumed_run_does_again_are_read_again(tmp_path, steps):
    path = tmp_path / "run.db"
    watched = Watched(METRIC)

    def write(steps, size):
        out = RunLogWriter(path)
        for step in steps:
            out.write(AttentionDiagnosis([], {"a": head_stats(2, max_logit=size + step, min_logit=0)}, step))
        out.close()

    write((10, 20, 30), 0.0)
    with RunLog(path) as log:
        watched.update(log)
        write(steps, 1024.0)
        watched.update(log)
        done = [10, *steps]
        assert watched.steps == done and watched.worst == [10.0, *(1024.0 + step for step in steps)]
        watched.update(log)
        assert watched.steps == done


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_stream_that_lacks_our_characters_gets_others(tmp_path, monkeypatch, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    path = run_of(tmp_path / "run.db", steps=2)
    monkeypatch.setattr("sys.stdout", stream)
    assert main(["watch", str(path), "--once"]) in (0, 1)
    stream.flush()
    assert b"range of a row's scores, largest: ? " in stream.buffer.getvalue()


def test_watch_says_it_all_as_json_too(tmp_path, capsys):
    path = run_of(tmp_path / "run.db", steps=20)
    assert main(["watch", str(path), "--once", "--json", "-"]) in (0, 1)
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["step"] == 200 and found["layers"]["layers.0.attn"][0] is None
    assert {issue["layer"] for issue in found["issues"]} >= {"layers.2.attn"}
    assert "layer 2 head 5" in captured.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["watch", "none.db"], "cannot read the run log none.db: No such file"),
        (["watch", "RUN", "--metric", "speed"], "expected --metric to be one of normalized_entropy, "),
        (["watch", "RUN", "--every", "0"], "expected seconds, at least 0.05, got '0'"),
        (["export", "RUN", "-o", "run.csv"], "expected --out to end in .parquet or .jsonl, got run.csv"),
        (["export", "text.db", "-o", "run.jsonl"], "expected a run log, got a file that SQLite cannot read"),
    ],
)
def test_wrong_input_is_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.db").write_text("no database" * 99)
    path = run_of(tmp_path / "run.db", steps=1)
    assert main([str(path) if x == "RUN" else x for x in arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_json_lines_hold_the_whole_run(tmp_path, capsys):
    path = run_of(tmp_path / "run.db", steps=3)
    assert main(["export", str(path), "-o", str(tmp_path / "run.jsonl")]) == 0
    assert "3 log steps" in capsys.readouterr().out
    found = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    kinds = [line["kind"] for line in found]
    assert kinds.count("snapshot") == 3 and kinds.count("scalar") == 30
    last = [line for line in found if line["kind"] == "snapshot"][-1]
    assert last["layers"]["layers.2.attn"]["max_logit"][5] == pytest.approx(4 * math.exp(1.5), rel=1e-3)
    assert last["layers"]["layers.0.attn"]["max_logit"][0] is None


def test_json_lines_go_to_standard_output_for_a_dash(tmp_path, monkeypatch, capsys):
    path = run_of(tmp_path / "run.db", steps=3)
    assert main(["export", str(path), "-o", str(tmp_path / "run.jsonl")]) == 0
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    assert main(["export", "run.db", "-o", "-", "--json", "document"]) == 0
    captured = capsys.readouterr()
    assert captured.out == (tmp_path / "run.jsonl").read_text() and not (tmp_path / "-").exists()
    assert captured.err == "3 log steps: standard output\n"
    assert json.loads((tmp_path / "document").read_text())["bytes"] is None


def test_parquet_has_a_row_for_each_head_and_log_step(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    path = run_of(tmp_path / "run.db", steps=3)
    assert main(["export", str(path), "-o", str(tmp_path / "run.parquet")]) == 0
    table = parquet.read_table(tmp_path / "run.parquet").to_pydict()
    assert list(table) == ["step", "layer", "head", *NAMES] and len(table["step"]) == 3 * 4 * 6
    place = next(
        i
        for i, key in enumerate(zip(table["step"], table["layer"], table["head"]))
        if key == (30, "layers.2.attn", 5)
    )
    assert table["max_logit"][place] == pytest.approx(4 * math.exp(1.5), rel=1e-3)
    assert math.isnan(table["max_logit"][table["step"].index(30)])
