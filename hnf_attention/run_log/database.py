"""The file of a run log: an SQLite database, one transaction a log step."""

from __future__ import annotations

import functools
import json
import math
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..diagnosis.thresholds import differing
from . import blocks, metrics
from .blocks import BadLog
from .records import Layout, Record

APPLICATION = 0x484E4641  # "HNFA", which `file` shows
#: The schema is what these scripts make one after the other. A newer version appends one.
SCRIPTS = (
    """
    -- One row for each process that wrote: a run that was resumed has several. about: JSON.
    CREATE TABLE sessions (
        id INTEGER PRIMARY KEY, uid TEXT NOT NULL UNIQUE, started REAL NOT NULL, about TEXT NOT NULL,
        received INTEGER NOT NULL
    );
    -- What a block's rows (metrics) and columns (layers and heads) are: JSON.
    CREATE TABLE layouts (id INTEGER PRIMARY KEY, described TEXT NOT NULL UNIQUE);
    -- One row a log step. block: float32 (metrics, heads), see `blocks`. first_step: below step where others were
    -- joined to it. forwards: JSON list of training, evaluation and failed ones. not_measured: JSON, layer to reason.
    CREATE TABLE snapshots (
        step INTEGER PRIMARY KEY, first_step INTEGER NOT NULL, session INTEGER NOT NULL, time REAL NOT NULL,
        training INTEGER NOT NULL, forwards TEXT NOT NULL, layout INTEGER NOT NULL, block BLOB NOT NULL,
        not_measured TEXT NOT NULL
    );
    -- What happened, by the log step that it was written with. kind: "issue" (change: new, worse, better, gone) or
    -- another. detail: JSON, with a "step" of its own where kind is no issue.
    CREATE TABLE events (
        id INTEGER PRIMARY KEY, step INTEGER NOT NULL, session INTEGER NOT NULL, kind TEXT NOT NULL, change TEXT,
        detail TEXT NOT NULL
    );
    CREATE INDEX events_by_step ON events (step);
    -- Loss, gradient norm, learning rate: one row a training step that gave one. NULL for NaN.
    CREATE TABLE scalars (
        name TEXT NOT NULL, step INTEGER NOT NULL, value REAL, PRIMARY KEY (name, step)
    ) WITHOUT ROWID;
    """,
)
VERSION = len(SCRIPTS)
#: What `on_step` notes of the steps that a run does. Users note other numbers at whatever step, such as once at 0.
_OF_STEPS = ("loss", "grad_norm")
_JOINED_AT_ONCE = 32  # pairs of log steps that one transaction joins
_WAIT = 10.0  # seconds for another process's transaction


def connect(path: Path) -> sqlite3.Connection:
    """Open a run log for writing; a new file gets the schema, an older one the rest of it. Raises BadLog or OSError."""
    if path.is_dir():
        raise IsADirectoryError(f"expected a run log, got the folder {path}")
    connection = _open(f"{path.absolute().as_uri()}?mode=rwc", path)
    with _closed_if_bad(connection, path):
        if _version(connection, path) == 0:
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        _use_wal(connection)
        # A crash of the machine may lose the latest log steps; the file stays whole.
        connection.execute("PRAGMA synchronous = NORMAL")
        # An error while a mapped page is read would end the process.
        connection.execute("PRAGMA mmap_size = 0")
        with transaction(connection):  # other processes may open the new file at the same time
            for version in range(_version(connection, path), VERSION):
                for statement in SCRIPTS[version].split(";\n"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {version + 1}")
                connection.execute(f"PRAGMA application_id = {APPLICATION}")
        _check_schema(connection, path)
    return connection


def _use_wal(connection: sqlite3.Connection) -> None:
    """Turn the write-ahead log on. It needs the file for itself for a moment, and SQLite does not wait for that."""
    end = time.monotonic() + _WAIT
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)


def connect_to_read(path: Path) -> tuple[sqlite3.Connection, bool]:
    """Open a run log that may be written meanwhile. Raises BadLog or OSError.

    Returns, too, whether what is written is seen: not in a folder where this process may make no files.
    """
    path.stat()  # OSError with the file's name
    if path.is_dir():
        raise BadLog(f"expected a run log, got the folder {path}")
    try:
        return _opened_to_read(path, "mode=ro"), True
    except OSError:
        # Beside a file with a write-ahead log even a reader makes files, which it may not do in each folder. Where
        # nobody writes, it can do without.
        ahead = path.with_name(f"{path.name}-wal")
        if ahead.exists() and ahead.stat().st_size:
            raise
        return _opened_to_read(path, "mode=ro&immutable=1"), False


def _opened_to_read(path: Path, how: str) -> sqlite3.Connection:
    connection = _open(f"{path.absolute().as_uri()}?{how}", path)
    with _closed_if_bad(connection, path):
        found = _version(connection, path)
        if found != VERSION:
            raise BadLog(f"expected a run log of version {VERSION}, got version {found}: {path}")
        connection.execute("PRAGMA mmap_size = 0")
        _check_schema(connection, path)
    return connection


@contextmanager
def _closed_if_bad(connection: sqlite3.Connection, path: Path) -> Iterator[None]:
    """Close a file that is no run log, or cannot be used as one; raises BadLog or OSError for it."""
    try:
        yield
    except sqlite3.OperationalError as error:
        connection.close()
        raise OSError(f"cannot use {path}: {error}") from error
    except sqlite3.DatabaseError as error:
        connection.close()
        raise BadLog(f"expected a run log, got a file that SQLite cannot read ({error}): {path}") from error
    except BadLog:
        connection.close()
        raise


def _check_schema(connection: sqlite3.Connection, path: Path) -> None:
    """Raise BadLog unless the tables are those of SCRIPTS.

    In a file of somebody else's, a view in the place of a table may have endless rows, a generated column a gigabyte in
    each row, and a trigger runs when this process writes.
    """
    wanted, found = _tables(_empty()), _tables(connection)
    changed = [name for name, statement in wanted.items() if found.get(name) != statement]
    (triggers,) = connection.execute("SELECT count(*) FROM sqlite_master WHERE type = 'trigger'").fetchone()
    if changed or triggers:
        what = f"other tables {', '.join(changed)}" if changed else "triggers"
        raise BadLog(f"expected the tables of a run log and no trigger, got {what}: {path}")


def _tables(connection: sqlite3.Connection) -> dict[str, tuple[str, str]]:
    """(type, statement that made it) by the name of each table and view."""
    rows = connection.execute("SELECT name, type, sql FROM sqlite_master WHERE type IN ('table', 'view')")
    return {name: (kind, _bare(statement)) for name, kind, statement in rows}


def _bare(statement: str) -> str:
    return " ".join(str(statement).split())


@functools.cache
def _empty() -> sqlite3.Connection:
    return in_memory()


def in_memory() -> sqlite3.Connection:
    """An empty run log that is no file."""
    connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    connection.executescript("".join(SCRIPTS))
    return connection


def begin_session(connection: sqlite3.Connection, uid: str, started: float, about: Mapping[str, Any]) -> int:
    """The number of a session, which is new unless it is known by its uid."""
    with transaction(connection):
        connection.execute(
            "INSERT OR IGNORE INTO sessions (uid, started, about, received) VALUES (?, ?, ?, 0)",
            (uid, started, json.dumps(about)),
        )
        return int(connection.execute("SELECT id FROM sessions WHERE uid = ?", (uid,)).fetchone()[0])


def add(connection: sqlite3.Connection, session: int, number: int, record: Record) -> None:
    """Add one log step in one transaction.

    number: counts the session's records from 1. One that is known is left out. What was written of this step and later
    ones is replaced: the run was resumed from a checkpoint before it.
    """
    with transaction(connection):
        (received,) = connection.execute("SELECT received FROM sessions WHERE id = ?", (session,)).fetchone()
        if number <= received:
            return
        connection.execute("UPDATE sessions SET received = ? WHERE id = ?", (number, session))
        if number > 1 and not _has_log_step(connection, session):
            # A session that ended without a log step, and goes on, tells its events again. It may have had log steps
            # without layers, whose events are told once.
            connection.executemany(
                "DELETE FROM events WHERE session = ? AND detail = ?",
                [(session, json.dumps(event)) for event in record.events],
            )
        _drop_later(connection, record, begins=number == 1)
        if record.layout.layers:
            _add_snapshot(connection, session, record)
        events = [event for event in record.events if not _is_known(connection, event)]
        connection.executemany(
            "INSERT INTO events (step, session, kind, change, detail) VALUES (?, ?, ?, ?, ?)",
            [
                *((record.step, session, "issue", how, json.dumps(issue)) for how, issue in record.changes),
                *((record.step, session, event["kind"], None, json.dumps(event)) for event in events),
            ],
        )
        connection.executemany(
            "INSERT OR REPLACE INTO scalars VALUES (?, ?, ?)",
            [
                (name, step, value if math.isfinite(value) else None)
                for name, pairs in record.scalars.items()
                for step, value in pairs
            ],
        )


def _add_snapshot(connection: sqlite3.Connection, session: int, record: Record) -> None:
    text = record.layout.text()
    connection.execute("INSERT OR IGNORE INTO layouts (described) VALUES (?)", (text,))
    (layout,) = connection.execute("SELECT id FROM layouts WHERE described = ?", (text,)).fetchone()
    connection.execute(
        "INSERT INTO snapshots VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            record.step,
            record.first_step,
            session,
            record.time,
            record.training,
            json.dumps(record.forwards),
            layout,
            record.block,
            json.dumps(record.not_measured),
        ),
    )


def _has_log_step(connection: sqlite3.Connection, session: int) -> bool:
    """Whether a session that writes now has written a log step: it is the latest one then."""
    latest = connection.execute("SELECT session FROM snapshots ORDER BY step DESC LIMIT 1").fetchone()
    return latest is not None and latest[0] == session


def _drop_later(connection: sqlite3.Connection, record: Record, begins: bool) -> None:
    """Drop what was written of this log step and of later ones.

    begins: the record is its session's first. It then stands for the steps since the first loss in it, too. One without
    a log step and a loss stands for none: somebody adds to a run that was.
    """
    own = [step for name in _OF_STEPS for step, _ in record.scalars.get(name, ()) if begins]
    if not (own or record.layout.layers):
        return
    first = min([record.step, *own])
    earlier = "SELECT coalesce(max(step), -1) FROM snapshots WHERE step < ?"
    (last,) = connection.execute(earlier, (first,)).fetchone()
    connection.execute("DELETE FROM snapshots WHERE step >= ?", (first,))
    connection.execute("DELETE FROM events WHERE step > ?", (last,))
    for name in record.scalars:
        since = first if begins else record.step + 1
        connection.execute("DELETE FROM scalars WHERE name = ? AND step >= ?", (name, since))


def _is_known(connection: sqlite3.Connection, event: Mapping[str, Any]) -> bool:
    """Whether an event tells the thresholds that the log tells already: each session tells its own."""
    return event["kind"] == "thresholds" and event.get("values") == thresholds(connection)


def thresholds(connection: sqlite3.Connection) -> dict[str, float]:
    """What the last log step was judged with in place of the table's. A text that is no such account is left out."""
    rows = connection.execute(
        "SELECT detail FROM events WHERE kind = 'thresholds' ORDER BY step DESC, id DESC"
    )
    for (text,) in rows:
        try:
            return differing(json.loads(text)["values"])
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            continue
    return {}


def active_issues(connection: sqlite3.Connection, step: int) -> list[dict[str, Any]]:
    """The issues that were there after the log step `step`, as they were last reported."""
    active: dict[tuple[Any, ...], dict[str, Any]] = {}
    rows = connection.execute(
        "SELECT change, detail FROM events WHERE kind = 'issue' AND step <= ? ORDER BY id", (step,)
    )
    for change, detail in rows:
        issue = json.loads(detail)
        key = issue.get("layer"), issue.get("head"), issue.get("issue_type")
        active.pop(key, None)
        if change != "gone":
            active[key] = issue
    return list(active.values())


def size(connection: sqlite3.Connection) -> int:
    """Bytes of the pages that are in use."""
    (pages,), (free,), (each,) = (
        connection.execute(f"PRAGMA {name}").fetchone()
        for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * each)


def thin(connection: sqlite3.Connection) -> bool:
    """Join pairs of neighbouring log steps, those that are close together for their age first; extremes are kept.

    Returns whether any were joined. The younger half of the log steps stays as it is.
    """
    steps = connection.execute("SELECT step, first_step, layout FROM snapshots ORDER BY step").fetchall()
    latest = steps[-1][0] if steps else 0
    pairs: list[tuple[int, int]] = []
    taken: set[int] = set()
    candidates = sorted(
        ((later[0] - earlier[1]) / max(latest - later[0], 1), index)
        for index, (earlier, later) in enumerate(zip(steps, steps[1 : len(steps) // 2]))
        if earlier[2] == later[2]
    )
    for _, index in candidates:
        if len(pairs) < _JOINED_AT_ONCE and not {index, index + 1} & taken:
            taken |= {index, index + 1}
            pairs.append((steps[index][0], steps[index + 1][0]))
    if not pairs:
        return False
    with transaction(connection):
        for earlier, later in pairs:
            _join(connection, earlier, later)
    connection.execute("PRAGMA incremental_vacuum")
    return True


def _join(connection: sqlite3.Connection, earlier: int, later: int) -> None:
    (described,) = connection.execute(
        "SELECT described FROM layouts JOIN snapshots ON layouts.id = layout WHERE step = ?", (later,)
    ).fetchone()
    layout = Layout.parse(described)
    tables, firsts = [], []
    for step in (earlier, later):
        block, first = connection.execute(
            "SELECT block, first_step FROM snapshots WHERE step = ?", (step,)
        ).fetchone()
        tables.append(blocks.decode(block, len(layout.metrics), layout.heads))
        firsts.append(first)
    block = blocks.encode(metrics.joined(list(layout.metrics), *tables))
    connection.execute("DELETE FROM snapshots WHERE step = ?", (earlier,))
    connection.execute(
        "UPDATE snapshots SET first_step = ?, block = ? WHERE step = ?", (min(firsts), block, later)
    )


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Everything inside or nothing of it is in the file."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        if connection.in_transaction:  # a full disk has ended it already
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _open(uri: str, path: Path) -> sqlite3.Connection:
    try:
        return sqlite3.connect(uri, uri=True, timeout=_WAIT, isolation_level=None, check_same_thread=False)
    except sqlite3.OperationalError as error:
        raise OSError(f"cannot open {path}: {error}") from error


def _version(connection: sqlite3.Connection, path: Path) -> int:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application in (0, APPLICATION) and version == tables == 0:
        return 0
    if application != APPLICATION or version < 1:
        raise BadLog(f"expected a run log, got another SQLite database: {path}")
    if version > VERSION:
        raise BadLog(f"expected a run log of version {VERSION} or older, got version {version}: {path}")
    return int(version)
