"""A campaign as it stands, read while it is written or afterwards: plain values for tables, maps and scripts.

Knows the tables; writes nothing, and needs no lock. Nothing of Ray, Hypothesis, torch.
"""

import contextlib
import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz.deep import schema

SLOWEST = 10
VIOLATED, HARNESS = "violated", "fault"


@dataclass(frozen=True)
class Failure:
    """A distinct failure. `same`: the number of an earlier one that came to the same folder."""

    number: int
    law: str
    tensor: str
    at: float
    state: str
    folder: str
    layout: str
    sentence: str
    same: int | None
    cases: int

    @property
    def id(self) -> str:
        """What tells it from others in other campaigns: law and tensor."""
        return f"{self.law} [{self.tensor}]"


@dataclass(frozen=True)
class Reading:
    """`cells`: cases and violations by layout; `growth`: (seconds, cases, and how much of each kind had been met)."""

    folder: Path
    meta: Mapping[str, Any]
    seconds: float
    sessions: Sequence[tuple]
    running: bool
    kinds: Mapping[str, int]  # cases by kind: case, broken, call
    outcomes: Mapping[tuple[str, str], int]  # by kind and outcome
    cells: Mapping[str, tuple[int, int]]
    broken: Mapping[str, Sequence[int]]  # the failures of a layout
    known: Mapping[str, Sequence[str]]  # the known bugs of megatron-core whose region was met at a layout
    seen: Mapping[str, int]
    growth: Sequence[tuple[float, str, int]]
    laws: Mapping[str, tuple[int, int]]  # fired, vacuous
    tally: Mapping[str, Mapping[str, float]]
    failures: Sequence[Failure]
    chunks: Sequence[tuple[str, int, float, int, float, str, int]]  # arm, seed, seconds, cases, worth, ended, shard
    slowest: Sequence[tuple[float, str, str, str]]  # seconds, kind, cell, document
    notes: Sequence[tuple[float, str, str]]

    @property
    def distinct(self) -> list[Failure]:
        """The failures that are not the same as an earlier one."""
        return [failure for failure in self.failures if failure.same is None]

    @property
    def faults(self) -> int:
        """Faults of the harness."""
        return sum(kind == HARNESS for _, kind, _ in self.notes)

    def verdict(self) -> str:
        """One line: the worst that there is to say."""
        number = len(self.distinct)
        if number:
            return f"{number} distinct failure{'s' * (number != 1)}"
        if self.faults:
            return f"no law violated, but {self.faults} faults of the harness"
        return "no law violated" if sum(self.kinds.values()) else "nothing has run"


class Damaged(ValueError):
    """The database of a campaign is torn."""


@dataclass(frozen=True)
class Glance:
    """What changes from second to second; `notes`: (kind, text), those asked for."""

    seconds: float = 0.0
    cases: int = 0
    cells: int = 0
    failures: int = 0
    notes: Sequence[tuple[str, str]] = ()


def glance(folder: Path, told: int = 0) -> Glance:
    """The campaign in short, with the notes after the first `told`; nothing where it has not begun."""
    counted = "SELECT (SELECT total(seconds) FROM sessions), (SELECT count(*) FROM cases), "
    counted += "(SELECT count(*) FROM seen WHERE kind='cell'), (SELECT count(*) FROM failures WHERE same IS NULL)"
    try:
        with contextlib.closing(_connected(folder / schema.NAME)) as db:
            notes = db.execute("SELECT kind, text FROM notes ORDER BY id LIMIT -1 OFFSET ?", (told,)).fetchall()
            seconds, cases, cells, failures = db.execute(counted).fetchone()
            return Glance(seconds, cases, cells, failures, notes)
    except sqlite3.DatabaseError:
        return Glance()


def spent(folder: Path) -> float:
    """Seconds of all drivers so far; 0 where there is nothing to read."""
    return glance(folder).seconds if (folder / schema.NAME).is_file() else 0.0


def read(folder: Path) -> Reading:
    """The campaign in a folder. ValueError, in one line, where there is none, or of another version, or damaged."""
    file = folder / schema.NAME
    if not file.is_file():
        raise ValueError(f"{folder} is no campaign: it has no {schema.NAME}")
    try:
        with contextlib.closing(_connected(file)) as db:
            return _read(folder, db)
    except sqlite3.DatabaseError as error:
        said = "resume it with `python -m fuzz deep --campaign`, which saves what can be read"
        raise Damaged(f"{file} cannot be read ({error}): {said}") from error


def _connected(file: Path) -> sqlite3.Connection:
    """To read only; a folder that cannot be written has no writer either."""
    try:
        db = sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True, timeout=schema.WAIT)
        db.execute("SELECT count(*) FROM meta").fetchone()
        return db
    except sqlite3.OperationalError:
        return sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro&immutable=1", uri=True)


def _read(folder: Path, db: sqlite3.Connection) -> Reading:
    db.execute("BEGIN")  # all of it as of one moment
    meta = {key: json.loads(value) for key, value in db.execute("SELECT key, value FROM meta")}
    if meta.get("version") != schema.VERSION:
        raise ValueError(f"campaign {folder} is of version {meta.get('version')}; this program has {schema.VERSION}")
    sessions = db.execute("SELECT began, seconds, budget, shards, ended FROM sessions ORDER BY id").fetchall()
    tally = _tally(db)
    laws = {law: (int(n), int(tally.get("vacuous", {}).get(law, 0))) for law, n in tally.get("fired", {}).items()}
    outcomes = {
        (kind, how): n for kind, how, n in db.execute("SELECT kind, outcome, count(*) FROM cases GROUP BY 1, 2")
    }
    kinds: dict[str, int] = defaultdict(int)
    for (kind, _), number in outcomes.items():
        kinds[kind] += number
    slowest = "SELECT seconds, kind, cell, document FROM cases WHERE kind='case' ORDER BY seconds DESC LIMIT ?"
    return Reading(
        folder=folder,
        meta=meta,
        seconds=sum(seconds for _, seconds, *_ in sessions),
        sessions=sessions,
        running=_locked(folder),
        kinds=dict(kinds),
        outcomes=outcomes,
        cells=_cells(db),
        broken=_gathered(db, "SELECT DISTINCT cell, failure FROM cases WHERE failure IS NOT NULL ORDER BY failure"),
        known=_gathered(db, _KNOWN),
        seen=dict(db.execute("SELECT kind, count(*) FROM seen GROUP BY kind")),
        growth=list(_growth(db)),
        laws=laws,
        tally=tally,
        failures=[Failure(*row) for row in db.execute(_FAILURES)],
        chunks=db.execute("SELECT arm, seed, seconds, cases, worth, ended, shard FROM chunks ORDER BY id").fetchall(),
        slowest=db.execute(slowest, (SLOWEST,)).fetchall(),
        notes=db.execute("SELECT at, kind, text FROM notes ORDER BY id").fetchall(),
    )


_FAILURES = """SELECT id, law, tensor, at, state, folder, layout, sentence, same,
(SELECT count(*) FROM cases WHERE cases.failure = failures.id) FROM failures ORDER BY id"""


_KNOWN = "SELECT substr(what, instr(what, ' & ') + 3), substr(what, 1, instr(what, ' & ') - 1) FROM seen "
_KNOWN += "WHERE kind='known' ORDER BY what"


def _gathered(db: sqlite3.Connection, asked: str) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = defaultdict(list)
    for key, value in db.execute(asked):
        found[key].append(value)
    return dict(found)


def _tally(db: sqlite3.Connection) -> dict[str, dict[str, float]]:
    tally: dict[str, dict[str, float]] = defaultdict(dict)
    for kind, name, number in db.execute("SELECT kind, name, number FROM tally"):
        tally[kind][name] = int(number)
    return dict(tally)


def _cells(db: sqlite3.Connection) -> dict[str, tuple[int, int]]:
    asked = "SELECT cell, count(*), sum(outcome='violated') FROM cases WHERE kind='case' GROUP BY cell"
    return {cell: (number, violated) for cell, number, violated in db.execute(asked)}


def _growth(db: sqlite3.Connection) -> Iterator[tuple[float, str, int]]:
    """How much had been met of each kind, whenever that changed."""
    number: dict[str, int] = defaultdict(int)
    for at, kind, new in db.execute("SELECT at, kind, count(*) FROM seen GROUP BY at, kind ORDER BY at"):
        number[kind] += new
        yield at, kind, number[kind]


def _locked(folder: Path) -> bool:
    """Whether a process writes it now."""
    import fcntl

    try:
        with open(folder / "writer") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
