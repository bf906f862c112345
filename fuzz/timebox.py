"""One test's search for the smallest failure: verdicts recorded by case, a budget of seconds, and the best so far.

Hypothesis stops shrinking by itself only after minutes, and shrinks one choice after another. So the first failure of
a kind is made smaller by leaps (`fuzz.descent`), and Hypothesis has the rest of the budget. Once that is spent, TimeUp
ends the search with the smallest that there is. Knows no pytest, no Hypothesis, no files.
"""

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from fuzz.case import Case, Violation
from fuzz.descent import smallest
from fuzz.order import size

HYPOTHESIS = 3.0  # seconds at least, if there are as many


class TimeUp(BaseException):
    """The budget of a search is spent. Hypothesis lets pass, and ends at, what is no Exception; else it would go on
    drawing for seconds, though nothing is run any more.
    """

    def __init__(self, violations: Sequence[Violation]) -> None:
        super().__init__("the time for shrinking is over")
        self.violations = violations

    def verdict(self) -> Exception:
        """What the test ends with: the smallest violation, or a group with one of each failure."""
        first, *others = self.violations
        return ExceptionGroup("several failures", self.violations) if others else first


@dataclass(frozen=True)
class Failure:
    """A broken law: how the smallest case so far breaks it, the first case that did, and how many were tried."""

    violation: Violation
    first: Case
    tried: int

    @property
    def identity(self) -> tuple[str, str]:
        """Law and root cause: what tells one failure from another."""
        return self.violation.law, self.violation.cause


class TimeBox:
    """The search of one test. `seconds` run from its first failure; `improved` is told every smaller case at once.

    `measure` says which of two is the smaller, `leaps` goes down from one that fails (`descent.smallest`).
    """

    def __init__(
        self,
        seconds: float,
        improved: Callable[[Failure], None],
        measure: Callable[[Any], tuple] = size,
        leaps: Callable[[Any, Callable[[Any], bool | None]], Any] = smallest,
    ) -> None:
        self.failures: dict[tuple[str, str], Failure] = {}
        self.cases = 0
        self._seconds, self._improved, self._measure, self._leaps = seconds, improved, measure, leaps
        self._verdicts: dict[Case, tuple[Violation, TracebackType | None] | None] = {}
        self._first: dict[tuple[str, str], Case] = {}
        self._until = self._end = float("inf")  # of the search as it stands, and of the budget

    def left(self) -> float:
        """Seconds of the budget that are left; infinite while nothing has failed."""
        return max(0.0, self._until - time.monotonic())

    def run(self, case: Case, judge: Callable[[Case], Violation | None]) -> None:
        """Judge a case, or repeat what was found; raises the Violation, or TimeUp with the smallest."""
        if not self.left():
            raise TimeUp([failure.violation for failure in self.failures.values()])
        if case not in self._verdicts:
            self._record(case, judge(case))
            self._descend(case, judge)
        if found := self._verdicts[case]:
            violation, where = found
            raise violation.with_traceback(where)

    def _record(self, case: Case, violation: Violation | None) -> None:
        self.cases += 1
        self._verdicts[case] = None
        if violation is not None:
            traceback.clear_frames(violation.__traceback__)  # else the observations of every failing case stay
            self._verdicts[case] = violation, violation.__traceback__
            if self._end == float("inf"):
                self._until = self._end = time.monotonic() + self._seconds
            self._compare(violation)

    def _descend(self, case: Case, judge: Callable[[Case], Violation | None]) -> None:
        """From the first case of a failure, and from each smaller one that Hypothesis comes to, go down by leaps, for
        at most half of what is left of the budget then.

        Where they end by themselves Hypothesis gets as long as they took, or HYPOTHESIS: little is left for it to do.
        """
        found = self._verdicts[case]
        identity = found and (found[0].law, found[0].cause)
        if identity is None or self.failures[identity].violation.case != case:
            return
        began = time.monotonic()
        until = began + (self._end - began) / 2

        def fails(other: Case) -> bool | None:
            if time.monotonic() > until:
                return None
            if other not in self._verdicts:
                self._record(other, judge(other))
            again = self._verdicts[other]
            return again is not None and (again[0].law, again[0].cause) == identity

        self._leaps(case, fails)
        if (ended := time.monotonic()) < until:
            self._until = min(self._end, ended + max(HYPOTHESIS, ended - began))

    def _compare(self, violation: Violation) -> None:
        key = violation.law, violation.cause
        first, best = self._first.setdefault(key, violation.case), self.failures.get(key)
        if best is None or self._measure(violation.case) < self._measure(best.violation.case):
            self.failures[key] = Failure(violation, first, self.cases)
            self._improved(self.failures[key])
