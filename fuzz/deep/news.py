"""`python -m fuzz news`: which failures of a campaign are new, and an issue for each, through the client `gh`.

A failure is known by law and first tensor, from a file that is kept beside the example database. Knows the reading.
"""

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from fuzz.deep.reading import Failure, Reading, read
from fuzz.deep.sums import summary

LABEL = "deep-run"
SECONDS = 60.0  # for one call of gh
MOST = 60_000  # characters of an issue: GitHub takes 65,536


def run(folder: Path, seen: Path, issues: bool, text: Path | None) -> int:
    """Say what is new and remember it; the exit code: 1 where something is. ValueError where that cannot be done."""
    reading, known = read(folder), _known(seen)
    new = [one for one in reading.distinct if key(one) not in known]
    if text:
        with open(text, "a", encoding="utf-8") as file:
            file.write(markdown(reading, new))
    if issues:
        _tell(reading)
    seen.parent.mkdir(parents=True, exist_ok=True)
    seen.write_text(json.dumps(known | {key(one): one.id for one in reading.distinct}, indent=1) + "\n")
    for one in new:
        print(f"new: {one.id}, smallest at {one.layout}: {folder / 'failures' / one.folder}")
    print(f"{len(new)} new of {len(reading.distinct)} distinct failures")
    return 1 if new else 0


def key(one: Failure) -> str:
    """What tells a failure from others over all campaigns, short."""
    return hashlib.blake2b(one.id.encode(), digest_size=8).hexdigest()


def _known(seen: Path) -> dict[str, str]:
    try:
        known = json.loads(seen.read_text()) if seen.exists() else {}
    except ValueError as error:
        raise ValueError(f"--seen {seen} is no list of failures: {error}") from error
    if not isinstance(known, dict):
        raise ValueError(f"--seen {seen} is no list of failures")
    return known


def markdown(reading: Reading, new: Iterable[Failure]) -> str:
    """The summary of a job: sums, and the failures with what is new."""
    fresh = {key(one) for one in new}
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in summary(reading))
    marks = {one.id: "**new**" if key(one) in fresh else "known" for one in reading.distinct}
    told = [(marks[one.id], _cell(one.law), f"`{one.tensor}`", one.layout, str(one.cases)) for one in reading.distinct]
    failures = "\n".join(f"| {' | '.join(row)} |" for row in told)
    head = "\n\n| | law | first tensor or cause | smallest layout | cases |\n|---|---|---|---|---|\n"
    return f"## Deep run\n\n| | |\n|---|---|\n{rows}{head + failures if failures else ''}\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


# ---- issues ----------------------------------------------------------------------------------------------------


def marker(one: Failure) -> str:
    """What an issue is found again by; not seen by who reads it."""
    return f"<!-- ep-ppo-fuzz {key(one)} -->"


def body(reading: Reading, one: Failure) -> str:
    """The text of an issue: the failure's report."""
    file = reading.folder / "failures" / one.folder / "report.md"
    report = file.read_text(encoding="utf-8", errors="replace") if one.folder and file.is_file() else ""
    return f"{(report or f'{one.law}: {one.sentence}')[:MOST]}\n\n{marker(one)}\n"


def _tell(reading: Reading) -> None:
    """Open an issue for each failure that has none, and say in the others that it was met again."""
    if not shutil.which("gh"):
        raise ValueError("--issues needs GitHub's client gh, which is not installed")
    asked = ("issue", "list", "--state", "open", "--label", LABEL, "--limit", "1000", "--json", "number,body")
    _gh("label", "create", LABEL, "--force", "--description", "found by the deep run")
    there = json.loads(_gh(*asked))
    for one in reading.distinct:
        number = next((issue["number"] for issue in there if marker(one) in issue["body"]), None)
        if number is None:
            title = f"{one.law} ({one.layout})"
            _gh("issue", "create", "--title", title, "--label", LABEL, "--body-file", "-", text=body(reading, one))
        else:
            again = f"Met again, in {one.cases} cases; smallest at {one.layout}."
            _gh("issue", "comment", str(number), "--body-file", "-", text=again)


def _gh(*words: str, text: str = "") -> str:
    done = subprocess.run(["gh", *words], input=text, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise ValueError(f"gh {' '.join(words[:2])} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return done.stdout
