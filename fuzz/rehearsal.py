"""Rows one after the other, and where one fails the search for what is simpler. Knows Hypothesis; no ranks, no laws."""

from collections.abc import Callable, Iterable
from typing import Any

from hypothesis import Phase, given, settings

from fuzz.case import Case, Violation
from fuzz.rows import Row
from fuzz.strategies import rows

Rehearse = Callable[[Case], None]
SIMPLER = 100  # cases at most in which a row's failure is looked for again, to be shrunk


def rehearse_rows(rehearse: Rehearse, tried: Iterable[Row], **quiet: Any) -> None:
    """Each row as it is; from the first that fails Hypothesis goes on to what is simpler, with settings as `quiet`."""
    for row in tried:
        if violation := _violation(rehearse, row.case):
            _simpler(rehearse, row, quiet)
            raise violation


def _violation(rehearse: Rehearse, case: Case) -> Violation | None:
    try:
        rehearse(case)
    except Violation as violation:
        return violation
    return None


def _simpler(rehearse: Rehearse, row: Row, quiet: dict[str, Any]) -> None:
    @settings(max_examples=SIMPLER, database=None, phases=[Phase.generate, Phase.shrink], **quiet)
    @given(rows(row.world, row.script))
    def at_most(case: Case) -> None:
        rehearse(case)

    at_most()
