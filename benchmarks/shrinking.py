"""Whether planted bugs shrink to their true minimum: `python benchmarks/shrinking.py [--only NAME] [--seconds 60]`.

Every bug is planted, found and shrunk as `test_any_case` does on 4 ranks, within a time box. The minimum is then held
against the truth: no neighbour that is smaller fails; the layout is that of the bug's docstring; drawn cases, and the
case itself under other seeds, hold on every smaller layout. Exit code 1 where fewer than 95 % are minimal.
"""

import argparse
import importlib
import inspect
import re
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asked import one_or_more
from hypothesis import HealthCheck, Phase, given, seed, settings
from rich.console import Console
from rich.table import Table

from fuzz import forking, known
from fuzz.case import Case, Violation
from fuzz.neighbours import moved, neighbours
from fuzz.order import size
from fuzz.space import NAMED, all_layouts, complexity, worlds
from fuzz.strategies import cases
from fuzz.timebox import Failure, TimeBox, TimeUp
from fuzz.trial import Trials
from toy_models.spec import Layout

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from planted_cases import PLANTED

RANKS = 4
ENOUGH = 0.95
PHASES = (Phase.generate, Phase.target, Phase.shrink)
QUIET: dict[str, Any] = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}


@dataclass
class Shrunk:
    """How the search for one bug went; `smallest` is None where it was not found."""

    smallest: Failure | None
    first: int  # cases to the first failure
    tried: int  # cases in all
    seconds: float  # from the first failure to the smallest


@dataclass
class Watched:
    """Notes when the failures of a time box got smaller, and says so where `loud`."""

    loud: bool
    began: float = 0.0
    first: int = 0
    last: float = 0.0

    def improved(self, failure: Failure) -> None:
        self.last = time.monotonic()
        if not self.began:
            self.began, self.first = self.last, failure.tried
        if self.loud:
            print(f"    {self.last - self.began:5.1f} s, case {failure.tried}: {failure.violation.case!r}")


def shrink(trials: Trials, asked: argparse.Namespace) -> Shrunk:
    """Find and shrink a bug as the property does."""
    watched = Watched(asked.trace)
    box = TimeBox(asked.seconds, watched.improved)

    @seed(asked.seed)
    @settings(max_examples=asked.cases, phases=PHASES, **QUIET)
    @given(cases(mostly=RANKS))
    def search(case: Case) -> None:
        box.run(case, lambda unseen: trials.judge(unseen).violation)

    with suppress(Violation, ExceptionGroup, TimeUp):
        search()
    smallest = min(box.failures.values(), key=lambda failure: size(failure.violation.case), default=None)
    return Shrunk(smallest, watched.first, box.cases, watched.last - watched.began)


def documented(bug: str) -> Layout:
    """The smallest layout as the docstring of a planted bug has it."""
    module, _, name = bug.partition(":")
    function = getattr(importlib.import_module(f"toy_models.planted.{module}"), name)
    minimal = re.search(r"minimal: (.*)", inspect.getdoc(function) or "")
    assert minimal, f"{bug} does not say what is minimal"
    return Layout(**{key: int(value) for key, value in (part.split("=") for part in minimal[1].split())})


# ---- the truth -------------------------------------------------------------------------------------------------


def fails(trials: Trials, case: Case, failure: Failure) -> bool:
    """Whether a case breaks the same law, of the same cause."""
    violation = trials.judge(case).violation
    return violation is not None and (violation.law, violation.cause) == failure.identity


def smaller_neighbour(trials: Trials, failure: Failure) -> str:
    """The first neighbour that is smaller and fails too; empty where there is none."""
    case = failure.violation.case
    for each in neighbours(case):
        if size(each.case) < size(case) and fails(trials, each.case, failure):
            return f"{each.dimension}={each.value} fails too"
    return ""


def smaller_layout(trials: Trials, failure: Failure, number: int) -> str:
    """The first smaller layout on which some case fails; empty where none of those tried does."""
    for layout in smaller_layouts(failure.violation.case.layout):
        for case in tried_on(layout, failure.violation.case, number):
            if fails(trials, case, failure):
                return f"{short(layout)} fails too: {case!r}"
    return ""


def smaller_layouts(layout: Layout) -> list[Layout]:
    found = [other for world in worlds(layout.world) for other in all_layouts(world)]
    return [other for other in found if (other.world, complexity(other)) < (layout.world, complexity(layout))]


def tried_on(layout: Layout, case: Case, number: int) -> Iterator[Case]:
    """The case itself on another layout, under three seeds, and drawn cases of it."""
    degrees: dict[str, Any] = {name: getattr(layout, name) for name in ("world", *NAMED)}
    yield from filter(None, (moved(case, **degrees, seed=case.seed + i) for i in range(3)))
    yield from drawn(degrees, number)


def drawn(degrees: dict[str, Any], number: int) -> list[Case]:
    """The same cases every time; the smallest, which Hypothesis tries first, is one of them."""
    found: list[Case] = []

    @seed(0)
    @settings(max_examples=number, phases=[Phase.generate], **QUIET)
    @given(cases(**degrees))
    def collect(case: Case) -> None:
        found.append(case)

    collect()
    return found


# ---- the table -------------------------------------------------------------------------------------------------


def short(layout: Layout) -> str:
    names = ("world", *NAMED)
    return " ".join(f"{name}={getattr(layout, name)}" for name in names if name == "world" or getattr(layout, name) > 1)


def verdict(trials: Trials, bug: str, shrunk: Shrunk, number: int) -> str:
    """'minimal', or why not."""
    if shrunk.smallest is None:
        return "not found"
    here, said = shrunk.smallest.violation.case.layout, documented(bug)
    if wrong := smaller_neighbour(trials, shrunk.smallest) or smaller_layout(trials, shrunk.smallest, number):
        return wrong
    return "minimal" if short(here) == short(said) else f"{short(here)} instead of {short(said)}"


def row(bug: str, shrunk: Shrunk, said: str) -> tuple[str, ...]:
    found = short(shrunk.smallest.violation.case.layout) if shrunk.smallest else ""
    numbers = (str(shrunk.first), str(shrunk.tried), f"{shrunk.seconds:.0f}")
    return bug, *numbers, found, short(documented(bug)), said


def examine(bug: str, asked: argparse.Namespace) -> tuple[str, ...]:
    with closing(Trials(plants=(*known.mends(), f"toy_models.planted.{bug}"))) as trials:
        shrunk = shrink(trials, asked)
        said = verdict(trials, bug, shrunk, asked.brute)
    if shrunk.smallest:
        violation = shrunk.smallest.violation
        print(f"{bug}: {said}; {violation.law}: {violation.case!r}", flush=True)
    return row(bug, shrunk, said)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", metavar="NAME", help="bugs whose names contain this")
    parser.add_argument("--seconds", type=float, default=60.0, help="of shrinking")
    parser.add_argument("--cases", type=one_or_more, default=300, help="drawn to find a bug")
    parser.add_argument("--brute", type=one_or_more, default=20, help="cases on every smaller layout")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace", action="store_true", help="print every smaller failure")
    asked = parser.parse_args()
    bugs = [bug for bug in PLANTED if not asked.only or any(part in bug for part in asked.only)]
    if not bugs:
        parser.error(f"--only={', '.join(asked.only)} names no planted bug; there are {', '.join(PLANTED)}")
    forking.warm_up()
    rows = [examine(bug, asked) for bug in bugs]
    table = Table("bug", "cases", "tried", "seconds", "found", "true", "verdict")
    for each in rows:
        table.add_row(*each)
    minimal = sum(each[-1] == "minimal" for each in rows)
    Console(width=160).print(table, f"{minimal} of {len(rows)} minimal ({minimal / len(rows):.0%})")
    return int(minimal < ENOUGH * len(rows))


if __name__ == "__main__":
    sys.exit(main())
