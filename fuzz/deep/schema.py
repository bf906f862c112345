"""The database of a campaign as text: tables, version, and how a damaged one is saved as far as it can be read.

Knows SQLite; nothing of cases, shards, Ray.
"""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

VERSION = 1
NAME = "campaign.db"
TABLES = {
    "meta": "key TEXT PRIMARY KEY, value TEXT NOT NULL",
    # one for each start of a driver; `seconds` grows while it runs, and is what has been spent of the budget
    "sessions": "id INTEGER PRIMARY KEY, began REAL NOT NULL, seconds REAL NOT NULL, budget REAL NOT NULL, "
    "shards INTEGER NOT NULL, ended TEXT NOT NULL",
    "chunks": "id INTEGER PRIMARY KEY, session INTEGER NOT NULL, shard INTEGER NOT NULL, arm TEXT NOT NULL, "
    "start INTEGER NOT NULL, seed INTEGER NOT NULL, began REAL NOT NULL, seconds REAL NOT NULL, "
    "cases INTEGER NOT NULL, worth REAL NOT NULL, ended TEXT NOT NULL",
    "cases": "id INTEGER PRIMARY KEY, chunk INTEGER NOT NULL, at REAL NOT NULL, seconds REAL NOT NULL, "
    "kind TEXT NOT NULL, cell TEXT NOT NULL, outcome TEXT NOT NULL, failure INTEGER, document TEXT NOT NULL",
    # what was met for the first time, and by which case: cells, behaviours, pairs, triples
    "seen": "kind TEXT NOT NULL, what TEXT NOT NULL, at REAL NOT NULL, PRIMARY KEY (kind, what)",
    "tally": "kind TEXT NOT NULL, name TEXT NOT NULL, number REAL NOT NULL, PRIMARY KEY (kind, name)",
    "failures": "id INTEGER PRIMARY KEY, law TEXT NOT NULL, tensor TEXT NOT NULL, at REAL NOT NULL, shard INTEGER, "
    "state TEXT NOT NULL, folder TEXT NOT NULL, layout TEXT NOT NULL, sentence TEXT NOT NULL, same INTEGER, "
    "UNIQUE (law, tensor)",
    "notes": "id INTEGER PRIMARY KEY, at REAL NOT NULL, kind TEXT NOT NULL, text TEXT NOT NULL",
}
INDICES = (
    "CREATE INDEX IF NOT EXISTS cells ON cases (cell, outcome)",
    "CREATE INDEX IF NOT EXISTS slowest ON cases (seconds)",
)
WAIT = 10.0  # seconds for another process that reads or checkpoints


def connect(file: Path) -> sqlite3.Connection:
    """To write; every statement is committed by itself unless within `with connection`."""
    connection = sqlite3.connect(file, timeout=WAIT)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")  # a killed process loses nothing; a power cut the last moments
    return connection


def create(connection: sqlite3.Connection) -> None:
    """The tables that are not there."""
    with connection:
        for name, columns in TABLES.items():
            connection.execute(f"CREATE TABLE IF NOT EXISTS {name} ({columns})")
        for index in INDICES:
            connection.execute(index)


def whole(file: Path) -> bool:
    """Whether the database can be read from end to end."""
    try:
        with contextlib.closing(connect(file)) as connection:
            answer = connection.execute("PRAGMA quick_check(1)").fetchone()
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")}
            return answer == ("ok",) and set(TABLES) <= tables
    except sqlite3.DatabaseError:
        return False


def save(file: Path) -> dict[str, int]:
    """Make a database of all rows that can still be read; the damaged one stays beside it. Rows by table."""
    damaged = _aside(file)
    with contextlib.closing(connect(file)) as connection:
        create(connection)
        return {name: _copied(damaged, connection, name) for name in TABLES}


def _aside(file: Path) -> Path:
    number = next(n for n in range(1, 1000) if not file.with_name(f"{file.name}.damaged{n}").exists())
    damaged = file.with_name(f"{file.name}.damaged{number}")
    for end in ("", "-wal", "-shm"):
        if (part := file.with_name(file.name + end)).exists():
            part.replace(damaged.with_name(damaged.name + end))
    _lengthen(damaged)
    return damaged


def _lengthen(file: Path) -> None:
    """SQLite reads nothing of a file that is shorter than its head says; with zeros at the end it reads up to them."""
    with open(file, "rb+") as opened:
        head = opened.read(32)
        size, pages = int.from_bytes(head[16:18], "big"), int.from_bytes(head[28:32], "big")
        if head.startswith(b"SQLite format 3") and file.stat().st_size < size * pages:
            opened.truncate(size * pages)


def _copied(damaged: Path, connection: sqlite3.Connection, table: str) -> int:
    """How many rows of a table could be read up to where it is torn."""
    number = 0
    with connection:
        for row in _readable(damaged, table):
            places = ", ".join("?" * len(row))
            number += connection.execute(f"INSERT OR IGNORE INTO {table} VALUES ({places})", row).rowcount
    return number


def _readable(damaged: Path, table: str) -> Iterator[tuple]:
    with contextlib.suppress(sqlite3.DatabaseError), contextlib.closing(sqlite3.connect(damaged)) as connection:
        yield from connection.execute(f"SELECT * FROM {table}")
