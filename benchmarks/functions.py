"""How many calls of the public functions of megatron-core are made and judged, function by function.

`python benchmarks/functions.py [--examples 5000] [--ranks 1,2,4] [--only NAME]`: a table of function, examples,
outcomes and seconds, and totals. Exits 1 where a function is broken or was never judged, 2 for an argument that cannot
be.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from rich.console import Console
from rich.table import Table

from fuzz import forking
from fuzz.case import Violation
from fuzz.functions.call import Call, size
from fuzz.functions.families import FAMILIES
from fuzz.functions.judge import KNOWN, OUTCOMES, REFUSED, RIGHT, UNJUDGED, judge
from fuzz.functions.strategies import LAYOUTS, calls
from fuzz.trial import Trials


class Tally:
    """Outcomes and seconds per function, and the smallest violation of each."""

    def __init__(self, trials: Trials) -> None:
        self.trials = trials
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.seconds: Counter[str] = Counter()
        self.violations: dict[tuple[str, str], Violation] = {}

    def add(self, call: Call) -> None:
        began = time.perf_counter()
        verdict = judge(self.trials, call)
        self.seconds[call.function] += time.perf_counter() - began  # type: ignore[assignment]
        self.outcomes[call.function, verdict.outcome] += 1
        if verdict.violation is not None:
            key = call.function, verdict.violation.law
            smallest = self.violations.get(key)
            if smallest is None or size(call) < size(smallest.case):  # type: ignore[arg-type]
                self.violations[key] = verdict.violation

    def row(self, function: str) -> list[str]:
        numbers = [self.outcomes[function, outcome] for outcome in OUTCOMES]
        return [function, str(sum(numbers)), *map(str, numbers), f"{self.seconds[function]:.1f}"]


def drawn(tally: Tally, function: str, world: int, examples: int) -> None:
    """Draw calls of a function and judge each; nothing is shrunk."""
    quiet: Any = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}

    @settings(max_examples=examples, derandomize=True, phases=[Phase.generate], **quiet)
    @given(calls(function=function, world=world))
    def made(call: Call) -> None:
        tally.add(call)

    made()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=5000)
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--only", default="", help="functions whose name has this in it")
    asked = parser.parse_args(arguments)
    worlds = [int(ranks) for ranks in asked.ranks.split(",") if ranks.isdigit()]
    names = [f"{family}.{name}" for family, of in FAMILIES.items() for name in of]
    functions = [name for name in names if asked.only in name]
    if asked.examples < 1 or not worlds or not set(worlds) <= set(LAYOUTS) or not functions:
        print(
            f"examples={asked.examples} ranks={asked.ranks} only={asked.only} must be 1 or more, of "
            f"{', '.join(map(str, LAYOUTS))}, and part of a function's name",
            file=sys.stderr,
        )
        return 2
    forking.warm_up()
    trials = Trials()
    tally, began = Tally(trials), time.perf_counter()
    for function in functions:
        for world in worlds:
            drawn(tally, function, world, -(-asked.examples // (len(functions) * len(worlds))))
    seconds = time.perf_counter() - began
    trials.close()
    return _told(tally, functions, seconds)


def _told(tally: Tally, functions: Sequence[str], seconds: float) -> int:
    table = Table("function", "examples", *OUTCOMES, "seconds")
    for function in functions:
        table.add_row(*tally.row(function))
    console = Console(width=140)
    console.print(table)
    for violation in tally.violations.values():
        console.print(str(violation), highlight=False, soft_wrap=True, markup=False)
    unjudged = [name for name in functions if not tally.outcomes[name, RIGHT] + tally.outcomes[name, KNOWN]]
    total = sum(tally.outcomes.values())
    per = {outcome: sum(tally.outcomes[name, outcome] for name in functions) for outcome in (REFUSED, UNJUDGED, KNOWN)}
    counted = ", ".join(f"{number} {outcome}" for outcome, number in per.items())
    console.print(
        f"{len(functions)} functions, {total} examples, {counted}, {len(tally.violations)} functions "
        f"violated, {seconds:.0f} s; never judged: {', '.join(unjudged) or 'none'}",
        soft_wrap=True,
    )
    return int(bool(tally.violations) or bool(unjudged))


if __name__ == "__main__":
    sys.exit(main())
