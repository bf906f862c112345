"""What is told about a failure: `report.md`, ready to paste into an issue. Knows values only and runs nothing."""

import platform
import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from importlib import metadata
from typing import Any

from fuzz import laws
from fuzz.case import Case, Violation

PACKAGES = ("megatron-core", "torch", "transformers", "hypothesis", "ep-ppo-fuzz")
AGAIN = 3  # times that a minimal case is run again


@dataclass(frozen=True)
class Report:
    """A failure and what was found out about it; what is empty was not tried."""

    violation: Violation
    runs: tuple[int, int] = (0, 0)  # how often the case failed when it was run again, of how many times
    divergence: str = ""  # a sentence
    modules: str = ""  # a table
    neighbourhood: str = ""  # a sentence
    neighbours: str = ""  # a table
    script: str = ""  # what the script is and what it said
    plants: tuple[str, ...] = ()
    commit: str = ""
    classified: str = ""  # logic, or GPU only; empty where there is no GPU
    missing: Sequence[str] = ()  # what could not be found out, and why

    def __str__(self) -> str:
        parts = (self._title(), self._law(), self._case(), self._witness(), self._way(), self._around(), self._ended())
        return "\n\n".join(filter(None, (*parts, self._how(), self._environment(), self._missing()))) + "\n"

    def _title(self) -> str:
        return f"# {title(self.violation)}"

    def _law(self) -> str:
        planted = f"\n\nFound with planted bugs: {', '.join(self.plants)}." if self.plants else ""
        return f"**Law.** {described(self.violation.law)}{planted}"

    def _case(self) -> str:
        layout = self.violation.case.layout
        names = [f.name for f in fields(layout)] + ["dp", "edp"]
        rows = (names, ["---"] * len(names), [str(getattr(layout, name)) for name in names])
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        return f"## Minimal case\n\n{table}\n\n{_else(self.violation.case)}\n\n```python\n{self.violation.case!r}\n```"

    def _witness(self) -> str:
        violation = self.violation
        rows = {"witness": violation.witness, "expected": violation.expected, "observed": _last(violation.observed)}
        also = f"\n\nThe same case also violates: {'; '.join(violation.also)}." if violation.also else ""
        table = "\n".join(f"| {name} | {_cell(text)} |" for name, text in rows.items())
        return f"## What was seen\n\n{_cell(violation.sentence)}.\n\n| | |\n|---|---|\n{table}{also}{self._again()}"

    def _again(self) -> str:
        failed, times = self.runs
        flaky = "" if failed == times else ": **it does not fail every time**"
        return (
            f"\n\nRun again {times} times, it failed {failed} times ({failed}/{times}){flaky}.{self._classified()}"
            if times
            else self._classified()
        )

    def _classified(self) -> str:
        return f"\n\nOn GPUs. {self.classified}." if self.classified else ""

    def _way(self) -> str:
        if not self.divergence:
            return ""
        return f"## Where it diverges\n\n{self.divergence}\n\n{self.modules}\n\n![divergence](divergence.png)"

    def _around(self) -> str:
        return (
            f"## What it depends on\n\n{self.neighbourhood}\n\n{self.neighbours}".strip() if self.neighbourhood else ""
        )

    def _ended(self) -> str:
        details = self.violation.details
        return f"## Every rank: last collective and stack\n\n```\n{details}\n```" if details else ""

    def _how(self) -> str:
        planted = "".join(f" --plant {plant}" for plant in self.plants)
        again = f"python -m fuzz replay{planted} case.json      # VIOLATED while the bug is there"
        script = f"python repro.py                     # {self.script}\n" if self.script else ""
        return f"## How to run\n\n```\n{script}{again}\n```"

    def _environment(self) -> str:
        commit = f" at commit {self.commit}" if self.commit else ""
        rows = [f"| {name} | {_version(name)}{commit if name == 'megatron-core' else ''} |" for name in PACKAGES]
        rows += [f"| Python | {platform.python_version()} |", f"| platform | {platform.platform()} |"]
        return "## Environment\n\n| | |\n|---|---|\n" + "\n".join(rows)

    def _missing(self) -> str:
        return "Not found out: " + "; ".join(self.missing) + "." if self.missing else ""


def title(violation: Violation) -> str:
    """One line for the head of an issue: what is violated and on which layout."""
    layout = violation.case.layout
    above = [f"{n.upper()}={getattr(layout, n)}" for n in ("tp", "ep", "etp", "cp", "pp") if getattr(layout, n) > 1]
    where = f"{', '.join(above) or 'no parallelism but DP'} on {layout.world} rank{'s' * (layout.world > 1)}"
    what = f"{violation.law}: {violation.cause}" if violation.cause else f"violated: {violation.law}"
    return f"{what} ({where})"


def described(law: str) -> str:
    """The law as a sentence of its own."""
    for function in (*laws.LIVENESS, *laws.LAWS, *laws.TWIN_LAWS):
        if _words(function.__name__) == _words(law):
            return (function.__doc__ or law).split("\n\n")[0].replace("\n    ", " ")
    return law


def _words(text: str) -> str:
    return re.sub(r"[\s_-]+", " ", text).lower()


def _else(case: Case) -> str:
    """What of the case has not its default, in words."""
    parts = {name: getattr(case, name) for name in ("model", "batch", "ppo", "switches")}
    said = [f"{name}: {changed}" for name, part in parts.items() if (changed := _changed(part))]
    said += [f"{f.name}: {getattr(case, f.name)}" for f in fields(case) if f.name in ("twin", "precision", "seed")]
    return "\n".join(f"- {one}" for one in said)


def _changed(part: Any) -> str:
    changed = {f.name: getattr(part, f.name) for f in fields(part) if f.default is not MISSING}
    return ", ".join(f"{n}={v!r}" for n, v in changed.items() if v != getattr(type(part), n))


def _last(text: str) -> str:
    """The last line: of a traceback the exception."""
    return text.strip().rpartition("\n")[2]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
