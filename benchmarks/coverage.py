"""What drawn cases cover, without running them: `python benchmarks/coverage.py [--cases 1000] [--max-ranks 4]`.

Drawn cases as the properties draw them, shared out evenly over their worlds; the covering rows; with them the rows for
three values at a time; and as many in all as `--cases`, these and, where they are fewer, drawn ones: how a run begins.
"""

import argparse
import time
from collections.abc import Iterable

from asked import one_or_more
from hypothesis import HealthCheck, given, settings
from rich.console import Console
from rich.table import Table

from fuzz import coverage, meetings
from fuzz.case import Case
from fuzz.rows import covering, threefold
from fuzz.space import NAMED, PROPERTIES, all_layouts, worlds
from fuzz.strategies import cases


def drawn(world: int, number: int) -> list[Case]:
    """The same `number` cases every time."""
    found: list[Case] = []

    @settings(max_examples=number, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(cases(mostly=world))
    def collect(case: Case) -> None:
        found.append(case)

    collect()
    return found


def covered(name: str, found: list[Case], max_ranks: int) -> list[str]:
    """One line: layouts, pairs and triples, of those that are possible."""
    words = [coverage.words(case, coverage.ALL) for case in found]
    places = {(case.layout.world, *(getattr(case.layout, name) for name in NAMED)) for case in found}
    possible = sum(len(all_layouts(world)) for world in worlds(max_ranks))
    return [
        name,
        str(len(found)),
        f"{len(places)} of {possible}",
        share(meetings.pairs(max_ranks), {pair for word in words for pair in coverage.pairs(word)}),
        share(meetings.threes(max_ranks), {three for word in words for three in coverage.threes(word)}),
    ]


def share(possible: Iterable[coverage.Meeting], met: set[coverage.Meeting]) -> str:
    """How many of the possible were met."""
    everything = set(possible)
    assert met <= everything, f"met, though no rule allows it: {sorted(met - everything)[:3]}"
    return f"{len(met)} of {len(everything)} ({len(met) / len(everything):.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=one_or_more, default=1000)
    parser.add_argument("--max-ranks", type=one_or_more, default=4)
    asked = parser.parse_args()
    sizes = [size for size in PROPERTIES if size <= asked.max_ranks]
    by_size = [drawn(size, asked.cases // len(sizes)) for size in sizes]
    mixed = [case for some in zip(*by_size, strict=True) for case in some]
    began = time.process_time()
    rows = {world: covering(world) for world in worlds(asked.max_ranks)}
    seconds = time.process_time() - began
    table, listed = (
        Table("cases", "number", "layouts", "pairs", "triples"),
        [r.case for some in rows.values() for r in some],
    )
    more = [*listed, *(row.case for size in sizes for row in threefold(size))]
    every = [*more, *mixed][: asked.cases]
    for name, found in {"drawn": mixed, "rows": listed, "three at a time": more, "and drawn": every}.items():
        table.add_row(*covered(name, found, asked.max_ranks))
    console = Console(width=120)
    console.print(table)
    numbers = ", ".join(f"{len(found)} at {world}" for world, found in rows.items())
    console.print(f"rows by ranks: {numbers}; found in {seconds:.1f} s of processor time")


if __name__ == "__main__":
    main()
