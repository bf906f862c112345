"""The search of one test, from its first case to the folders of its failures: time box, progress, what is written.

Knows no pytest (conftest.py does) and no Hypothesis.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from fuzz.case import Case, Violation
from fuzz.folders import ROOT, Folders
from fuzz.investigate import AROUND, investigate
from fuzz.progress import Watcher, layout_of
from fuzz.report import Report
from fuzz.timebox import Failure, TimeBox
from fuzz.trial import Trials


@dataclass(frozen=True)
class Row:
    """A failure as a run tells of it: plain text, which travels from pytest-xdist's workers."""

    law: str
    layout: str
    found: str  # after how many cases, and how often it failed when it was run again
    depends: str
    diverges: str
    folder: str
    example: str
    violation: str  # in full, of the smallest case

    def plain(self) -> dict[str, str]:
        """For the way between processes."""
        return asdict(self)

    def told(self) -> str:
        """Below the violation: what else is known, and where it is written."""
        lines = {
            "found": self.found,
            "depends on": self.depends,
            "diverges": self.diverges,
            "report": f"{self.folder}/report.md",
            "replay": f"python -m fuzz replay {self.folder}",
        }
        return "\n".join(f"{name:<11} {text}" for name, text in lines.items() if text)


class Search:
    """`name` and `cases` (how many are drawn) are shown on the console, if there is one when the first case comes.

    `seconds`: for shrinking, all failures together; at most half of that goes to the neighbours of each. `root`: where
    `.fuzz` lies.
    """

    def __init__(
        self, name: str, cases: int, seconds: float, root: Path, console: Callable[[], Console | None]
    ) -> None:
        self.box = TimeBox(seconds, self._improved)
        self.folders = Folders(root / ROOT)
        self._best: dict[tuple[str, str], tuple[Failure, Path]] = {}
        self._name, self._cases, self._console, self._root = name, cases, console, root
        self._around = min(AROUND, seconds / 2)
        self._watcher: Watcher | None = None

    def run(self, case: Case, judge: Callable[[Case], Violation | None]) -> None:
        """Judge a case, show how far the search is; raises the Violation."""
        if not self.box.cases and self._watcher is None and (console := self._console()):
            self._watcher = Watcher(console, self._name, self._cases)
        try:
            self.box.run(case, judge)
        finally:
            if self._watcher:
                self._watcher.show(self.box)

    def close(self) -> None:
        """Take the bar away: nothing more is searched."""
        if self._watcher:
            self._watcher.close()

    def _improved(self, failure: Failure) -> None:
        folder = self.folders.keep(failure)
        self._best[failure.identity] = failure, folder
        if self._watcher and not self._watcher.has_bar:
            where, law = layout_of(failure.violation.case), failure.violation.law
            self._watcher.say(
                f"{self._name}: {law} is violated at {where}, case {failure.tried}: {self._short(folder)}"
            )

    def investigate(self, trials: Trials, known: Mapping[str, Row]) -> list[tuple[Row, Report | None]]:
        """The failures and what was found out about them; those in `known` were investigated by another test."""
        found: list[tuple[Row, Report | None]] = []
        for failure, folder in self._best.values():
            if row := known.get(self._short(folder)):
                found.append((row, None))
                continue
            if self._watcher:
                where = f"{failure.violation.law} at {layout_of(failure.violation.case)}"
                self._watcher.say(f"{self._name}: {where}: now what it depends on, where it diverges, its script")
            folder, report = investigate(failure, trials, self.folders, self._around)
            found.append((self._row(failure, folder, report), report))
        return found

    def best(self) -> list[Row]:
        """The failures so far, where the search was interrupted."""
        return [self._row(failure, folder) for failure, folder in self._best.values()]

    def _row(self, failure: Failure, folder: Path, report: Report | None = None) -> Row:
        violation = report.violation if report else failure.violation
        return Row(
            law=violation.law,
            layout=layout_of(violation.case),
            found=f"smallest of {self.box.cases} cases; {_again(report)}",
            depends=report.neighbourhood if report else "",
            diverges=report.divergence if report else "",
            folder=self._short(folder),
            example=f"@example({violation.case!r})",
            violation=str(violation).strip("\n"),
        )

    def _short(self, folder: Path) -> str:
        return str(folder.relative_to(self._root)) if folder.is_relative_to(self._root) else str(folder)


def _again(report: Report | None) -> str:
    if report is None:
        return "interrupted: not run again"
    again = "run again, it failed {} of {} times".format(*report.runs) if report.runs[1] else "not run again"
    return f"{again}; {report.classified}" if report.classified else again
