"""Files of somebody who means harm: each is refused with a clear error, or read, in bounded time and memory."""

import json
import resource
import sqlite3
import sys
import tracemalloc
import zlib
from html.parser import HTMLParser

import pytest
from heads import head_stats

from hnf_attention import report
from hnf_attention.cli import check
from hnf_attention.cli.main import main
from hnf_attention.diagnosis import AttentionDiagnosis, StabilityIssue
from hnf_attention.errors import InputError
from hnf_attention.integrations import read_jsonl
from hnf_attention.run_log import BadLog, RunLog, RunLogWriter, database, fragments, writer

pytestmark = pytest.mark.slow

MARKUP = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'`${alert(3)}\u2028-->"
TABLES = {
    "sessions": ("uid", "started", "about", "received"),
    "layouts": ("described",),
    "snapshots": (
        *("first_step", "session", "time", "training", "forwards", "layout", "block", "not_measured"),
    ),
    "events": ("step", "session", "kind", "change", "detail"),
    "scalars": ("name", "step", "value"),
}
VALUES = {
    "text": "x",
    "markup": MARKUP,
    "bytes": b"\xff\x00\xfe",
    "nothing": "",
    "negative": -(2**63),
    "largest": 2**63 - 1,
    "infinite": float("inf"),
    "fraction": 0.5,
    "deep": "[" * 100_000,
    "list": "[]",
    "numbers": '{"step": 1e400, "layer": [], "head": {}, "severity": 7, "kind": null}',
    "digits": "9" * 10_000,
    "surrogate": '{"step": 1, "layer": "\\ud800", "headline": "\\ud800\\u001b[2J", "issue_type": "\\ud800"}',
    "bomb": zlib.compress(bytes(1 << 22)),
}


def issue(layer="a"):
    words = {"source": layer, "evidence": layer, "suggestion": layer, "brief": layer}
    return StabilityIssue(layer, 0, "overflow_risk", "error", 1.0, 2.0, **words)


def made(path, layer="a"):
    out = RunLogWriter(path, about={"model": layer})
    for step in (1, 2, 3):
        out.note(step, loss=0.5)
        out.event(step, "intervention", action=layer, outcome="open", text=layer)
        found = AttentionDiagnosis([issue(layer)], {layer: head_stats(2)}, step, not_measured={"b": layer})
        out.write(found)
    out.close()
    return path


def spoilt(path, table, column, value):
    connection = sqlite3.connect(path)
    last = "step = 3" if table == "scalars" else f"rowid = (SELECT max(rowid) FROM {table})"
    try:
        connection.execute(f"UPDATE {table} SET {column} = ? WHERE {last}", (value,))
        connection.commit()
    finally:
        connection.close()
    return path


def read_all(path):
    with RunLog(path) as log:
        repr(log)
        for record in log.records():
            record.table.sum()
        for layer in log.layers:
            log.metric("max_logit", layer)
        return log.steps, log.events, log.issues, log.sessions, log.not_measured, log.scalars()


def attempt(look, *args):
    """Run it; an error has to be one that says what was expected."""
    try:
        look(*args)
    except (InputError, OSError) as error:
        assert str(error) and len(str(error)) < 1000 and "\n" not in str(error)


def command(arguments, capsys):
    assert main([str(argument) for argument in arguments]) in (0, 1, 2)
    said = capsys.readouterr().err
    assert "fault of hnf-attention" not in said and "Traceback" not in said, said


CELLS = [(table, column, name) for table, columns in TABLES.items() for column in columns for name in VALUES]
COMMANDS = {
    "read": lambda path, capsys: attempt(read_all, path),
    "watch": lambda path, capsys: command(["watch", path, "--once"], capsys),
    "report": lambda path, capsys: command(["report", path, "--out", path.with_name("r.html")], capsys),
    "export": lambda path, capsys: command(["export", path, "--out", path.with_name("r.jsonl")], capsys),
}


def quickly(cell):
    return cell in (("snapshots", "block", "bomb"), ("events", "step", "text"), ("scalars", "value", "text"))


@pytest.mark.parametrize("use", COMMANDS)
@pytest.mark.parametrize(
    "cell",
    [pytest.param(x, id=" ".join(x), marks=() if quickly(x) else pytest.mark.exhaustive) for x in CELLS],
)
def test_any_value_in_any_cell_is_read_or_refused(cell, use, tmp_path, capsys):
    table, column, name = cell
    path = made(tmp_path / "run.db")
    try:
        spoilt(path, table, column, VALUES[name])
    except sqlite3.IntegrityError:
        pytest.skip("SQLite takes no such value here")
    COMMANDS[use](path, capsys)


@pytest.mark.parametrize(
    "statement",
    [
        # endless rows
        "CREATE VIEW snapshots AS WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT x AS step, "
        "x AS first_step, 1 AS session, 0.0 AS time, 1 AS training, '[1,0,0]' AS forwards, 1 AS layout, "
        "x'' AS block, '{}' AS not_measured FROM c",
        # a gigabyte in each row of a file of some pages
        "CREATE TABLE snapshots (step INTEGER PRIMARY KEY, first_step INTEGER, session INTEGER, time REAL, training "
        "INTEGER, forwards TEXT, layout INTEGER, block AS (zeroblob(1000000000)), not_measured TEXT)",
    ],
    ids=["view", "generated column"],
)
def test_another_schema_is_refused(statement, tmp_path):
    path = made(tmp_path / "run.db")
    connection = sqlite3.connect(path)
    connection.execute("DROP TABLE snapshots")
    connection.execute(statement)
    connection.commit()
    connection.close()
    for use in (RunLog, RunLogWriter):
        with pytest.raises(
            BadLog, match="expected the tables of a run log and no trigger, got other tables snap"
        ):
            use(path)


def test_triggers_are_refused_and_indexes_and_views_of_the_users_are_not(tmp_path):
    path = made(tmp_path / "run.db")
    connection = sqlite3.connect(path)
    connection.execute("CREATE INDEX mine ON events (kind)")
    connection.execute("CREATE VIEW losses AS SELECT * FROM scalars")
    connection.commit()
    assert len(read_all(path)[0]) == 3
    connection.execute("CREATE TRIGGER t AFTER INSERT ON snapshots BEGIN DELETE FROM snapshots; END")
    connection.commit()
    connection.close()
    for use in (RunLog, RunLogWriter):
        with pytest.raises(BadLog, match="no trigger, got triggers"):
            use(path)


def claim(path, heads, block):
    """Have the layout claim so many heads."""
    described = json.dumps({"metrics": ["max_logit"], "layers": [["a", heads, 8, "x", 1]]})
    spoilt(path, "layouts", "described", described)
    connection = sqlite3.connect(path)
    connection.execute("UPDATE snapshots SET block = ?", (block,))
    connection.commit()
    connection.close()


def test_a_decompression_bomb_takes_no_more_than_it_claims(tmp_path):
    path = made(tmp_path / "run.db")
    machine = zlib.compressobj(9)
    bomb = b"".join(machine.compress(bytes(1 << 20)) for _ in range(64)) + machine.flush()
    claim(path, 1000, bomb)
    tracemalloc.start()
    with pytest.raises(BadLog, match="expected 4000 bytes, got more"):
        read_all(path)
    assert tracemalloc.get_traced_memory()[1] < 10e6  # of 64 MB
    tracemalloc.stop()


@pytest.mark.parametrize("heads", [1 << 26, 1 << 30, 10**30])
def test_a_claim_of_many_heads_takes_no_memory(heads, tmp_path, capsys):
    path = made(tmp_path / "run.db")
    claim(path, heads, zlib.compress(b""))
    tracemalloc.start()
    for use in COMMANDS.values():
        use(path, capsys)
    assert tracemalloc.get_traced_memory()[1] < 60e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"number": 1e400}',
        '{"number": 1, "step": -1}',
        json.dumps({"number": 1, "step": 2, "layout": "{}"}),
        '{"\\ud800": 1}',
        "9" * 10_000,
    ],
    ids=range(6),
)
def test_lines_of_fragments_are_read_or_left_out(line, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(writer, "network_file_system", lambda folder: "nfs4")
    path = made(tmp_path / "run.db")
    (file,) = fragments.folder_of(path).iterdir()
    good = file.read_text().splitlines()
    file.write_text("\n".join([good[0], line, *good[1:], line]) + "\n")
    for use in COMMANDS.values():
        use(path, capsys)
    with RunLog(path) as log:
        assert log.steps.tolist() == [1, 2, 3]
    for head in (line, '{"format": 1, "uid": {}, "order": "x", "started": [], "about": 7}'):
        file.write_text("\n".join([head, *good[1:]]) + "\n")
        with pytest.raises(BadLog, match="expected a fragment of a run log"):
            RunLog(path)


def test_a_fragment_names_no_file(tmp_path, monkeypatch):
    """What a fragment says of itself is no path: nothing is read or written outside of its folder."""
    monkeypatch.setattr(writer, "network_file_system", lambda folder: "nfs4")
    path = made(tmp_path / "a" / "run.db")
    (file,) = fragments.folder_of(path).iterdir()
    head, *rest = file.read_text().splitlines()
    told = json.loads(head) | {"uid": "../../outside"}
    file.write_text("\n".join([json.dumps(told), *rest]) + "\n")
    read_all(path)
    assert {x.name for x in tmp_path.iterdir()} == {"a"}


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.scripts, self.bad = 0, []

    def handle_starttag(self, tag, attributes):
        self.scripts += tag == "script"
        self.bad += [(tag, name) for name, _ in attributes if name.startswith("on")]
        self.bad += [
            (tag, value) for name, value in attributes if name in ("src", "href") and value[:1] != "#"
        ]


@pytest.mark.parametrize(
    "layer", [MARKUP, "\x1b]0;x\x07", "../../etc/passwd", "x" * 100_000, "{{7*7}}", "a\nb"]
)
def test_strings_of_a_run_are_no_markup_of_its_page(layer, tmp_path, capsys):
    with RunLog(made(tmp_path / "plain.db")) as log:
        plain = Tags()
        plain.feed(report.html(log).text)
    with RunLog(made(tmp_path / "run.db", layer)) as log:
        text = report.html(log, title=layer, names=[layer]).text
    tags = Tags()
    tags.feed(text)
    assert tags.scripts == plain.scripts and not tags.bad and not plain.bad
    assert "<img" not in text.replace("&lt;img", "")
    command(["watch", tmp_path / "run.db", "--once"], capsys)
    main(["watch", str(tmp_path / "run.db"), "--once"])
    assert "\x1b" not in capsys.readouterr().out
    assert {x.suffix for x in tmp_path.iterdir()} <= {".db", ".db-wal", ".db-shm"}


@pytest.mark.parametrize(
    "line", ["7", "[]", "null", '"x"', "{}", '{"kind": "run", "layers": 7}', '{"kind": "snapshot", "step": []}',
             '{"kind": "snapshot", "step": 1e400}', '{"kind": "reading", "step": 1, "issues": 3}'],
)  # fmt: skip
def test_lines_of_a_jsonl_file_that_nobody_wrote_are_refused(line, tmp_path):
    (tmp_path / "a.jsonl").write_text(f"{line}\n")
    with pytest.raises(ValueError, match="expected lines of a JSONLWriter in .*a.jsonl, got one with"):
        read_jsonl(tmp_path / "a.jsonl")


def test_deep_lines_of_a_jsonl_file_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text("[" * 100_000 + "\n" + "9" * 10_000 + "\n")
    assert read_jsonl(tmp_path / "a.jsonl").snapshots == []


def test_a_configuration_of_many_bytes_is_refused_before_it_is_read(tmp_path, capsys):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(check.LARGEST + 1)  # no byte of it is on the disk
    tracemalloc.start()
    assert main(["check", str(path)]) == 2
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
    assert "expected a configuration of at most 67,108,864 bytes" in capsys.readouterr().err


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are those of Linux")
def test_the_process_stays_below_two_gigabytes():
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2 << 20  # kilobytes, after all tests above


def test_the_schema_is_that_of_a_new_file(tmp_path):
    connection = database.connect(tmp_path / "run.db")
    assert database._tables(connection) == database._tables(database.in_memory())
    connection.close()
