"""The folder of a campaign: what was run, seen and found. One process writes it, all may read it while it is written.

    campaign.db   the log (`fuzz.deep.schema`); what is committed outlives SIGKILL
    lock, writer  held by the driver and by the process that writes
    failures/     a folder for each distinct failure
    examples/     Hypothesis's example database

Knows files and SQLite; nothing of Hypothesis, ranks, Ray. A case comes as a Record: plain data.
"""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import sqlite3
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz.deep import schema

RUNNING, DONE, EXHAUSTED, FAULT, LOST = "running", "done", "exhausted", "fault", "lost"  # how a chunk ended
CLAIMED, FOUND, OPEN = "claimed", "found", "open"  # a failure that a shard shrinks; that has its report; that none has
WORTH = {"cell": 10.0, "behaviour": 5.0, "pair": 1.0, "triple": 0.25, "known": 0.0}  # the rarer the more
TICK = 0.1  # seconds between two tries to get a lock


@dataclass(frozen=True, kw_only=True)
class Record:
    """A finished case, as a shard tells of it. `new`: what this shard has not met before, (kind, what)."""

    seconds: float
    kind: str  # case, broken configuration, call
    cell: str  # the layout in words
    outcome: str  # holds, violated, inconclusive
    failure: int | None = None
    document: str = ""  # the case to replay, where somebody may want to
    new: tuple[tuple[str, str], ...] = ()
    tally: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


class Lock:
    """One holder at a time, by flock: it ends with its process, however that ends."""

    def __init__(self, file: Path, seconds: float = 0.0) -> None:
        """ValueError where another process still has it after `seconds`; it says which."""
        self._file = open(file, "a+")  # noqa: SIM115  (held until close)
        until = time.monotonic() + seconds
        while not self._taken():
            if time.monotonic() > until:
                self._file.seek(0)
                holder = self._file.read().strip() or "another process"
                self._file.close()
                raise ValueError(f"campaign {file.parent} is being written by {holder}: end that, or take another one")
            time.sleep(TICK)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def _taken(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def close(self) -> None:
        self._file.close()


def check(folder: Path) -> None:
    """ValueError, in one line, where the folder cannot be a campaign's."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--campaign {folder} is a file; a campaign is a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / schema.NAME).exists():
        strangers = [
            path.name for path in folder.iterdir() if path.name not in ("lock", "writer", "failures", "examples")
        ]
        if strangers:
            raise ValueError(
                f"--campaign {folder} has no {schema.NAME}, but {strangers[0]}: name a new or empty folder"
            )


class Campaign:
    """A campaign to write. ValueError where the folder is another's, of another version, or being written."""

    def __init__(self, folder: Path, patience: float = 0.0) -> None:
        check(folder)
        for path in (folder, folder / "failures", folder / "examples"):
            path.mkdir(parents=True, exist_ok=True)
        self.folder, self.warnings = folder, list[str]()
        self._lock = Lock(folder / "writer", patience)
        try:
            self._db = self._opened()
        except BaseException:
            self._lock.close()
            raise
        self._session, self._began, self._before = 0, time.monotonic(), self.spent()

    def _opened(self) -> sqlite3.Connection:
        file = self.folder / schema.NAME
        if file.exists() and not schema.whole(file):
            rows = schema.save(file)
            said = f"{file} was damaged: {rows['cases']} cases and {rows['failures']} failures could be read"
            self.warnings.append(f"{said}, and the campaign goes on from these; the damaged file lies beside it")
        connection = schema.connect(file)
        schema.create(connection)
        version = connection.execute("SELECT value FROM meta WHERE key='version'").fetchone()
        if version is not None and version != (str(schema.VERSION),):
            connection.close()
            raise ValueError(f"campaign {self.folder} is of version {version[0]}; this program has {schema.VERSION}")
        with connection:
            connection.execute("INSERT OR IGNORE INTO meta VALUES ('version', ?)", (str(schema.VERSION),))
        return connection

    def close(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            self._db.close()
        self._lock.close()

    # ---- what is asked for, and time ---------------------------------------------------------------------------

    def describe(self, **values: Any) -> None:
        """Keep what was asked for and where it runs."""
        with self._db:
            pairs = [(key, json.dumps(value)) for key, value in values.items()]
            self._db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", pairs)

    def described(self, key: str, default: Any = None) -> Any:
        row = self._db.execute("SELECT value FROM meta WHERE key=?", (key,)).fetchone()
        return json.loads(row[0]) if row else default

    def begin(self, budget: float, shards: int) -> float:
        """A driver starts: the seconds of `budget` that are left. What the last one had running is lost."""
        with self._db:
            self._db.execute("UPDATE chunks SET ended=? WHERE ended=?", (LOST, RUNNING))
            self._db.execute("UPDATE failures SET state=?, shard=NULL WHERE state=?", (OPEN, CLAIMED))
            row = (None, time.time(), 0.0, budget, shards, RUNNING)
            self._session = self._db.execute("INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?)", row).lastrowid or 0
        self._began = time.monotonic()
        return budget - self._before

    def spent(self) -> float:
        """Seconds of all drivers so far."""
        return float(self._db.execute("SELECT total(seconds) FROM sessions").fetchone()[0])

    def at(self) -> float:
        """Seconds of the campaign."""
        return self._before + time.monotonic() - self._began

    def beat(self, ended: str = RUNNING) -> None:
        """The driver is there: its time is counted up to now."""
        with self._db:
            now = (time.monotonic() - self._began, ended, self._session)
            self._db.execute("UPDATE sessions SET seconds=?, ended=? WHERE id=?", now)

    # ---- chunks and cases --------------------------------------------------------------------------------------

    def chunk(self, shard: int, arm: str, start: int, seed: int) -> int:
        """A shard begins a chunk; its number."""
        row = (None, self._session, shard, arm, start, seed, self.at(), 0.0, 0, 0.0, RUNNING)
        with self._db:
            return self._db.execute(f"INSERT INTO chunks VALUES ({_places(row)})", row).lastrowid or 0

    def end(self, chunk: int, ended: str) -> None:
        """How a chunk ended."""
        with self._db:
            self._db.execute("UPDATE chunks SET ended=?, seconds=?-began WHERE id=?", (ended, self.at(), chunk))

    def record(self, chunk: int, record: Record) -> int:
        """A case has finished; how many things it met for the first time in this campaign."""
        at = self.at()
        row = (None, chunk, at, *(getattr(record, name) for name in ("seconds", "kind", "cell", "outcome", "failure")))
        row = (*row, record.document)
        with self._db:
            self._db.execute(f"INSERT INTO cases VALUES ({_places(row)})", row)
            kinds = [kind for kind, what in record.new if self._is_new(kind, what, at)]
            worth = sum(map(WORTH.__getitem__, kinds))
            changed = (worth, at, chunk)
            self._db.execute("UPDATE chunks SET cases=cases+1, worth=worth+?, seconds=?-began WHERE id=?", changed)
            self._add(record.tally)
        return len(kinds)

    def _is_new(self, kind: str, what: str, at: float) -> bool:
        return self._db.execute("INSERT OR IGNORE INTO seen VALUES (?, ?, ?)", (kind, what, at)).rowcount > 0

    def _add(self, tally: Mapping[str, Mapping[str, float]]) -> None:
        rows = [(kind, name, number) for kind, table in tally.items() for name, number in table.items()]
        add = "INSERT INTO tally VALUES (?, ?, ?) ON CONFLICT (kind, name) DO UPDATE SET number=number+excluded.number"
        self._db.executemany(add, rows)

    def pulls(self) -> list[tuple[str, int, float, float, str]]:
        """Every chunk in order: arm, where in its rows, seconds, worth, how it ended."""
        return self._db.execute("SELECT arm, start, seconds, worth, ended FROM chunks ORDER BY id").fetchall()

    # ---- failures ----------------------------------------------------------------------------------------------

    def claim(self, law: str, tensor: str, shard: int, layout: str, sentence: str) -> tuple[int, bool]:
        """The number of a failure, and whether this shard is the one to shrink it."""
        row = (None, law, tensor, self.at(), shard, CLAIMED, "", layout, sentence, None)
        with self._db:
            new = self._db.execute(f"INSERT OR IGNORE INTO failures VALUES ({_places(row)})", row).rowcount > 0
            mine = (CLAIMED, shard, law, tensor, OPEN)
            again = "UPDATE failures SET state=?, shard=? WHERE law=? AND tensor=? AND state=?"
            taken = new or self._db.execute(again, mine).rowcount > 0
        number, owner, state = self._db.execute(
            "SELECT id, shard, state FROM failures WHERE law=? AND tensor=?", (law, tensor)
        ).fetchone()
        return number, taken or (owner == shard and state == CLAIMED)

    def keep(self, failure: int, folder: str, files: Mapping[str, bytes], layout: str, sentence: str) -> None:
        """What is known of a failure so far; a folder of another name takes the place of the one before."""
        before = self._db.execute("SELECT folder FROM failures WHERE id=?", (failure,)).fetchone()[0]
        place = self.folder / "failures" / folder
        if before and before != folder:
            self._leave(failure, self.folder / "failures" / before, place)
        place.mkdir(exist_ok=True)
        for name, data in files.items():
            part = place / f".{Path(name).name}.part"
            part.write_bytes(data)
            part.replace(place / Path(name).name)
        with self._db:
            now = (folder, layout, sentence, failure)
            self._db.execute("UPDATE failures SET folder=?, layout=?, sentence=? WHERE id=?", now)

    def _leave(self, failure: int, old: Path, place: Path) -> None:
        """A folder that no other failure has becomes the new one, or goes where that is there already."""
        others = self._db.execute("SELECT count(*) FROM failures WHERE folder=? AND id!=?", (old.name, failure))
        if others.fetchone()[0] or not old.exists():
            return
        if place.exists():
            shutil.rmtree(old)
        else:
            old.rename(place)

    def found(self, failure: int) -> None:
        """A failure is shrunk and has its report; one that came to the same folder as an earlier one is the same."""
        with self._db:
            [folder] = self._db.execute("SELECT folder FROM failures WHERE id=?", (failure,)).fetchone()
            same = "SELECT min(id) FROM failures WHERE folder=? AND folder != '' AND id < ?"
            [first] = self._db.execute(same, (folder, failure)).fetchone()
            self._db.execute("UPDATE failures SET state=?, same=? WHERE id=?", (FOUND, first, failure))

    def lost(self, shard: int) -> None:
        """A shard has ended in the middle: what it ran is over, what it shrank is free for the next that meets it."""
        with self._db:
            self._db.execute("UPDATE chunks SET ended=? WHERE ended=? AND shard=?", (LOST, RUNNING, shard))
            free = (OPEN, shard, CLAIMED)
            self._db.execute("UPDATE failures SET state=?, shard=NULL WHERE shard=? AND state=?", free)

    def note(self, kind: str, text: str) -> None:
        """Something a reader should know: a fault of the harness, a shard lost, a database that is down."""
        with self._db:
            self._db.execute("INSERT INTO notes VALUES (?, ?, ?, ?)", (None, self.at(), kind, text))


def _places(row: Iterable[Any]) -> str:
    return ", ".join("?" for _ in row)
