"""`python -m fuzz bisect`: one case, or a script that shows a bug, on several releases of megatron-core.

Knows environments by their Python, the command `replay`, and what verdicts in the order of versions mean. The case is
judged by the code of today on megatron-core as released, without mends. Options are `fuzz.__main__`'s.
"""

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import fuzz
from fuzz import commands
from fuzz.case_files import find
from fuzz.environments import Interpreter, OtherPython, check, interpreter, order, place, python_of
from fuzz.replay import flat, printable

RELEASES = ("0.13.1", "0.14.0", "0.15.3", "0.16.1", "0.17.1", "0.18.2", "0.19.2")
HOLDS, VIOLATED, INCONCLUSIVE, SKIPPED = "HOLDS", "VIOLATED", "INCONCLUSIVE", "SKIPPED"
CODES = {0: HOLDS, 1: VIOLATED}  # of a script that shows a bug; a traceback is no verdict
NOT_THERE = ("ImportError", "ModuleNotFoundError", "AttributeError", "TypeError")  # what a release has not


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line asks for; `pythons` are tried in turn, after this one."""

    case: Path
    versions: tuple[str, ...] = RELEASES
    law: str = ""
    pythons: tuple[str, ...] = ()
    cache: Path | None = None
    seconds: float = 300.0  # for a case on one version
    json: bool = False


@dataclass(frozen=True)
class Judged:
    """What became of the case on one version: HOLDS, VIOLATED, INCONCLUSIVE or SKIPPED, the law, and why."""

    version: str
    outcome: str
    python: str = ""
    law: str = ""
    why: str = ""


def run(asked: Asked) -> int:
    """Judge and print; 0 where it holds wherever it was judged, 1 where it is violated somewhere, 2 where nothing said.

    ValueError, in one line, where the case or a version is none, or an environment cannot be built.
    """
    versions = sorted({check(version) for version in asked.versions}, key=order)
    if not versions:
        raise ValueError("--versions names none")
    _check_case(asked.case)
    bases = [interpreter(path) for path in (sys.executable, *asked.pythons)]
    places = _environments(versions, bases, asked.cache or place())
    done = list(_judged(places, asked))
    _print(done, asked)
    outcomes = {one.outcome for one in done}
    return 1 if VIOLATED in outcomes else 0 if HOLDS in outcomes else 2


def _check_case(path: Path) -> None:
    if path.suffix == ".py":
        if not path.is_file():
            raise ValueError(f"{printable(str(path))}: there is no such script")
        return
    found = find(path)
    if len(found) > 1:
        raise ValueError(f"{printable(str(path))} has {len(found)} case files; name one")
    try:
        found[0].case()
    except ValueError as error:
        raise ValueError(f"{printable(str(path))} {error}") from error


# ---- environments ----------------------------------------------------------------------------------------------

Place = tuple[str, str, str]  # version, the Python of its environment or '', or why there is none


def _environments(versions: Sequence[str], bases: Sequence[Interpreter], cache: Path) -> list[Place]:
    """An environment for each version, all before the first case is run."""
    console = Console(stderr=True)
    found = []
    for version in versions:
        with console.status(f"environment of megatron-core {version}"):
            found.append(_environment(version, bases, cache))
    return found


def _environment(version: str, bases: Sequence[Interpreter], cache: Path) -> Place:
    for base in bases:
        try:
            return version, python_of(version, base, cache), ""
        except OtherPython as other:
            needs = str(other)
    had = ", ".join(base.version for base in bases)
    return version, "", f"needs Python {needs}, not {had}; --python PATH names one that has torch and transformers"


# ---- verdicts --------------------------------------------------------------------------------------------------


def _judged(places: Sequence[Place], asked: Asked) -> Iterator[Judged]:
    console = Console(stderr=True)
    for version, python, why in places:
        with console.status(f"megatron-core {version}: {printable(asked.case.name)}"):
            one = judged(version, python, asked) if python else Judged(version, SKIPPED, why=why)
        if not console.is_terminal:
            console.print(f"{version}: {one.outcome}", highlight=False)
        yield one


def judged(version: str, python: str, asked: Asked) -> Judged:
    """What the case or the script says in one environment."""
    path = asked.case.resolve()
    options = ["--no-known", "--any-version", "--json", *(["--law", asked.law] if asked.law else [])]
    script = path.suffix == ".py"
    command = [python, str(path)] if script else [python, "-m", "fuzz", "replay", str(path), *options]
    code, said = commands.run(command, path.parent, asked.seconds, surroundings())
    name = re.search(r"-py([\d.]+)-", python)
    shown = name[1] if name else ""
    if code is None:
        return Judged(version, INCONCLUSIVE, shown, why=f"no verdict within {asked.seconds:g} s")
    return Judged(version, *(_of_script(code, said, shown) if script else _of_replay(said, shown)))


def surroundings() -> dict[str, str]:
    """The variables under which an environment finds this package; none where it shares it already."""
    root = Path(fuzz.__file__).parents[1]
    return {} if root.name == "site-packages" else {"PYTHONPATH": str(root)}


def _of_script(code: int, said: str, python: str) -> tuple[str, str, str, str]:
    last = flat(said)
    if code in CODES and "Traceback (most recent call last)" not in said:
        return CODES[code], python, "", last
    return INCONCLUSIVE, python, "", f"exit code {code}: {last}"


def _of_replay(said: str, python: str) -> tuple[str, str, str, str]:
    document = re.search(r"^\[\n.*?^\]$", said, re.MULTILINE | re.DOTALL)
    if document is None:
        return INCONCLUSIVE, python, "", _reason(said)
    [one] = json.loads(document[0])
    told = flat(one["sentence"] or one["why"] or one["observed"])
    if one["outcome"] == VIOLATED and _cannot_be_said(one):
        return INCONCLUSIVE, python, "", f"cannot be expressed there: {flat(one['observed'])}"
    outcome = {"FIXED": HOLDS}.get(one["outcome"], one["outcome"])
    return (outcome if outcome in (HOLDS, VIOLATED) else INCONCLUSIVE), python, one["law"], told


def _cannot_be_said(one: dict[str, Any]) -> bool:
    """Whether what died is our own code, which asks megatron-core for what this release has not."""
    frames = [file for file in re.findall(r'File "([^"]+)", line', one["observed"]) if "/torch/" not in file]
    return bool(frames) and "/megatron/core/" not in frames[-1] and flat(one["observed"]).startswith(NOT_THERE)


def _reason(said: str) -> str:
    """Why there is no verdict: the last line that is an exception or a fault, else the last of all."""
    lines = [line.strip() for line in said.splitlines() if re.search(r"(Error|fault): |Error$", line)]
    return flat(lines[-1] if lines else said)


# ---- what is printed -------------------------------------------------------------------------------------------


def conclusions(done: Sequence[Judged]) -> list[str]:
    """Where the bug came in and where it went, by the versions that were judged."""
    clear = [one for one in done if one.outcome in (HOLDS, VIOLATED)]
    broken = [one.version for one in clear if one.outcome == VIOLATED]
    if not broken:
        return ["violated in none of the versions that were judged"] if clear else ["no version was judged"]
    lines = [f"there in {clear[0].version}, the oldest that was judged"] if clear[0].version == broken[0] else []
    for before, after in pairwise(clear):
        if before.outcome != after.outcome:
            word = "introduced" if after.outcome == VIOLATED else "mended"
            lines.append(f"{word} in {after.version}, or after {before.version}")
    lines += [f"lives in {broken[-1]}, the newest that was judged"] if clear[-1].version == broken[-1] else []
    laws = sorted({one.law for one in clear if one.law and one.outcome == VIOLATED})
    return [*lines, f"not one law in all versions: {'; '.join(laws)}; --law asks for one"] if len(laws) > 1 else lines


def _print(done: Sequence[Judged], asked: Asked) -> None:
    lines = conclusions(done)
    if asked.json:
        print(json.dumps({"versions": [asdict(one) for one in done], "conclusions": lines}, indent=2), flush=True)
        return
    table = Table("megatron-core", "Python", "verdict", "law", "in words")
    for one in done:
        table.add_row(one.version, one.python, one.outcome, one.law, one.why)
    console = Console(width=max(Console().width, int(os.environ.get("COLUMNS", "150"))))
    console.print(table, markup=False)
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
