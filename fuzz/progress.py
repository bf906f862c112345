"""What is seen while a test runs: a bar on a terminal, a line now and then elsewhere. Knows no pytest and no ranks."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fuzz.case import Case
from fuzz.timebox import TimeBox
from toy_models.spec import Layout

EVERY = 20.0  # seconds between two plain lines


class Watcher:
    """Shows how far the search of one test has come; begins with the first case and ends with `close`."""

    def __init__(self, console: Console, name: str, cases: int) -> None:
        self._console, self._name, self._said = console, name, time.monotonic()
        self._bar = _bar(console) if console.is_terminal else None
        if self._bar:
            self._task = self._bar.add_task(name, total=cases, said="")
            self._bar.start()

    @property
    def has_bar(self) -> bool:
        """Whether somebody looks at a terminal."""
        return self._bar is not None

    def show(self, box: TimeBox) -> None:
        """Called after every case."""
        if self._bar:
            self._bar.update(self._task, completed=box.cases, said=_said(box))
        elif time.monotonic() - self._said > EVERY:
            self._said = time.monotonic()
            self.say(f"{self._name}: {box.cases} cases{', ' * bool(box.failures)}{_said(box)}")

    def say(self, text: str) -> None:
        """One line that stays."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar:
            self._bar.stop()


def _bar(console: Console) -> Progress:
    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[said]}"))
    return Progress(SpinnerColumn(), TextColumn("{task.description}"), *columns, console=console, transient=True)


def _said(box: TimeBox) -> str:
    """What is being shrunk, and for how long yet."""
    if not box.failures:
        return ""
    best = "; ".join(f"{f.violation.law} at {layout_of(f.violation.case)}" for f in box.failures.values())
    return f"shrinking, {box.left():.0f} s left: {best}"


def layout_of(case: Case) -> str:
    """Ranks and degrees above one."""
    return in_words(case.layout)


def in_words(layout: Layout) -> str:
    """Ranks and degrees above one."""
    degrees = [f"{n.upper()}={getattr(layout, n)}" for n in ("tp", "ep", "etp", "cp", "pp") if getattr(layout, n) > 1]
    return " ".join([f"{layout.world} rank{'s' * (layout.world > 1)}", *degrees])
