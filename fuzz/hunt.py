"""The search for one planted bug, as the suite would make it: covering rows, then properties, until it is found.

Nothing is chosen for the bug: rows and cases are those of every run, worlds in turn, with fixed seeds and no database.
Found means that a case breaks a law with the bug planted and holds without it. Knows Hypothesis and trials; no files.
"""

import itertools
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from fuzz.case import Case, HarnessFault, Violation
from fuzz.order import size
from fuzz.progress import layout_of
from fuzz.rehearsal import Rehearse, rehearse_rows
from fuzz.rows import Row, covering
from fuzz.space import PROPERTIES, worlds
from fuzz.strategies import cases
from fuzz.timebox import TimeBox, TimeUp
from fuzz.trial import Trials

RANKS = 4  # the largest world that a run draws by default
CHUNK = 12  # cases of one property, as in a run
QUIET: dict[str, Any] = {
    "derandomize": True,
    "deadline": None,
    "print_blob": False,
    "suppress_health_check": [HealthCheck.too_slow],  # how slowly this machine draws is no news here
}
PINS: tuple[dict[str, str], ...] = (
    {},
    {"twin": "other_dispatcher"},
    {"twin": "plain_switches"},
    {"twin": "again"},
    {"precision": "float32"},
)


@dataclass(frozen=True, kw_only=True)
class Recalled:
    """How the search for one bug ended. `seconds` and `cases` are of the search, shrinking is apart; `minimal` is the
    smallest case that shows it, None where it was not found; `alarms` broke a law without the bug too; `fault` says why
    it could not be planted.
    """

    id: str
    law: str = ""
    seconds: float = 0.0
    cases: int = 0
    minimal: Case | None = None
    shrink_seconds: float = 0.0
    alarms: tuple[str, ...] = ()
    fault: str = ""

    @property
    def found(self) -> bool:
        return self.minimal is not None

    def told(self) -> str:
        """In half a line."""
        if self.fault:
            return self.fault
        tried = f"{self.seconds:.1f} s, {self.cases} cases"
        shrunk = f", shrunk to {layout_of(self.minimal)} in {self.shrink_seconds:.1f} s" if self.minimal else ""
        return f"{self.law or 'not found'} ({tried}{shrunk})"


# ---- what is tried ---------------------------------------------------------------------------------------------


def rows_in_turn() -> tuple[Row, ...]:
    """The covering rows of all worlds, mixed evenly: no bug has to wait until smaller worlds are done."""
    lists = [covering(world) for world in worlds(RANKS)]
    placed = [((at + 0.5) / len(some), n, row) for n, some in enumerate(lists) for at, row in enumerate(some)]
    return tuple(row for *_, row in sorted(placed, key=lambda each: each[:2]))


def search(rehearse: Rehearse, rows: Iterable[Row]) -> None:
    """The rows, then a chunk of each property in turn, for ever; ends by what `rehearse` raises."""
    rehearse_rows(rehearse, rows, **QUIET)
    sizes = [world for world in PROPERTIES if world <= RANKS]
    for number, (pins, world) in enumerate(itertools.cycle(itertools.product(PINS, reversed(sizes)))):
        _chunk(rehearse, number, cases(mostly=world, **pins))  # type: ignore[arg-type]


def _chunk(rehearse: Rehearse, number: int, drawn: st.SearchStrategy[Case]) -> None:
    @seed(number)
    @settings(max_examples=CHUNK, database=None, phases=[Phase.generate, Phase.target, Phase.shrink], **QUIET)
    @given(drawn)
    def some(case: Case) -> None:
        rehearse(case)

    some()


# ---- one bug ---------------------------------------------------------------------------------------------------


@dataclass
class Hunt:
    """One bug: `planted` are trials with it, `healthy` without. `progress` is told the number of cases after each."""

    planted: Trials
    healthy: Trials
    rows: tuple[Row, ...]
    seconds: float
    shrink_seconds: float
    progress: Callable[[int], None] = lambda cases: None
    alarms: list[str] = field(default_factory=list)
    cases: int = 0

    def run(self, id: str) -> Recalled:
        """Search, then shrink what was found. HarnessFault where the bug cannot be planted."""
        self._began, self._found = time.monotonic(), 0.0
        box = TimeBox(self.shrink_seconds, lambda failure: None)
        with suppress(Violation, ExceptionGroup, TimeUp):
            search(lambda case: box.run(case, self._judge), self.rows)
        ended = time.monotonic()
        seen = Recalled(id=id, seconds=ended - self._began, cases=self.cases, alarms=tuple(self.alarms))
        if not self._found:
            return seen
        smallest = self._smallest([failure.violation for failure in box.failures.values()])
        seen = replace(seen, seconds=self._found - self._began, shrink_seconds=ended - self._found)
        return replace(seen, law=smallest.law, minimal=smallest.case, alarms=tuple(self.alarms))

    def _judge(self, case: Case) -> Violation | None:
        """What the case breaks with the bug; nothing where it breaks without it too, until the bug is found."""
        if self._found:
            return _judged(self.planted, case)
        if time.monotonic() - self._began > self.seconds:
            raise TimeUp([])
        violation = _judged(self.planted, case)
        self.cases += 1
        self.progress(self.cases)
        if violation is None or self._is_alarm(violation):
            return None
        self._found, self._first = time.monotonic(), violation
        return violation

    def _is_alarm(self, violation: Violation) -> bool:
        broken = _judged(self.healthy, violation.case)
        self.alarms += [told(broken)] if broken else []
        return broken is not None

    def _smallest(self, violations: Iterable[Violation]) -> Violation:
        """The smallest that holds without the bug."""
        ordered = sorted(violations, key=lambda violation: size(violation.case))
        return next((one for one in ordered if not self._is_alarm(one)), self._first)


def _judged(trials: Trials, case: Case) -> Violation | None:
    """The violation of a case. HarnessFault where a law itself fails on what it was given."""
    try:
        return trials.judge(case).violation
    except Exception as error:
        raise HarnessFault(f"the laws cannot judge {case!r}: {type(error).__name__}: {error}") from error


def told(violation: Violation) -> str:
    """A false alarm in one line: the law, and the case to replay."""
    return f"{violation.law}: {violation.case!r}"


def control(
    healthy: Trials, rows: tuple[Row, ...], number: int, progress: Callable[[int], None]
) -> tuple[int, list[str]]:
    """How many cases of the same search ran without a bug, `number` of them, and what was violated all the same."""
    seen: set[Case] = set()
    alarms: list[str] = []

    def rehearse(case: Case) -> None:
        if len(seen) >= number:
            raise TimeUp([])
        if case in seen:
            return
        seen.add(case)
        broken = _judged(healthy, case)
        alarms.extend([told(broken)] if broken else [])
        progress(len(seen))

    with suppress(TimeUp):
        search(rehearse, rows)
    return len(seen), alarms
