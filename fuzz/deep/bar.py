"""What is seen while a campaign runs: a bar on a terminal, a line now and then elsewhere. Knows no Ray and no files."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from fuzz.deep.reading import Glance

EVERY = 30.0  # seconds between two plain lines


class Bar:
    """Shows seconds of a budget, cases, layouts and failures."""

    def __init__(self, console: Console, budget: float, shards: int) -> None:
        self._console, self._budget, self._shards, self._said = console, budget, shards, time.monotonic()
        self._first: tuple[float, int] | None = None
        columns = (SpinnerColumn(), BarColumn(bar_width=20), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        if self._bar:
            self._task = self._bar.add_task("starting", total=budget)
            self._bar.start()

    def show(self, glance: Glance, running: int) -> None:
        """How far it is."""
        said = self._line(glance, running)
        if self._bar:
            self._bar.update(self._task, completed=min(glance.seconds, self._budget), description=said)
        elif time.monotonic() - self._said > EVERY:
            self._said = time.monotonic()
            self.say(said)

    def _line(self, glance: Glance, running: int) -> str:
        """The rate is of this driver's time, and of what it has seen."""
        self._first = self._first or (glance.seconds, glance.cases)
        seconds, cases = glance.seconds - self._first[0], glance.cases - self._first[1]
        rate = f", {cases / seconds:.1f}/s" if seconds > 1 else ""
        failures = f"{glance.failures} failure{'s' * (glance.failures != 1)}"
        time_ = f"{glance.seconds:.0f} of {self._budget:.0f} s"
        shards = f"{running} of {self._shards} shards"
        return f"{time_}: {glance.cases} cases{rate}, {glance.cells} layouts, {failures}, {shards}"

    def say(self, text: str) -> None:
        """One line that stays."""
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
