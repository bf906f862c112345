"""Every layout once, each with a drawn case of its own, judged by all laws: `python benchmarks/layouts.py`.

`--max-ranks 8` are the 203 layouts of 1, 2, 4 and 8 ranks with power-of-two degrees, `--max-ranks 16` adds 371. Prints
a line for each, then times per world and the slowest; exit code 1 where a law was broken.
"""

import argparse
import sys
import time
from statistics import median

from asked import one_or_more
from hypothesis import HealthCheck, Phase, given, seed, settings
from rich.console import Console
from rich.table import Table

from fuzz import known
from fuzz.case import Case
from fuzz.space import NAMED, PROPERTIES, all_layouts
from fuzz.strategies import cases
from fuzz.trial import Trials, Verdict
from toy_models.spec import Layout


def drawn(layout: Layout, start: int) -> Case:
    """A case of this layout: the second that is drawn, as the first is always the simplest."""
    found: list[Case] = []
    pins = {name: getattr(layout, name) for name in NAMED}

    @seed(start)
    @settings(max_examples=2, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(cases(world=layout.world, **pins))
    def collect(case: Case) -> None:
        found.append(case)

    collect()
    return found[-1]


def said(verdict: Verdict) -> str:
    """One word or a few on how it went."""
    met = f"known: {', '.join(known.met(verdict.case))}" if known.met(verdict.case) else "holds"
    return verdict.violation.law if verdict.violation else "; ".join(verdict.doubts) or met


def show(rows: list[tuple[Layout, float, Verdict]], console: Console) -> None:
    table = Table("ranks", "layouts", "median s", "slowest s", "slowest layout", "broken")
    for world in sorted({layout.world for layout, _, _ in rows}):
        here = [row for row in rows if row[0].world == world]
        layout, longest, _ = max(here, key=lambda row: row[1])
        broken = sum(verdict.violation is not None for _, _, verdict in here)
        times = median(seconds for _, seconds, _ in here)
        table.add_row(str(world), str(len(here)), f"{times:.2f}", f"{longest:.2f}", named(layout), str(broken))
    console.print(table)


def named(layout: Layout) -> str:
    """The degrees above one."""
    return " ".join(f"{name}{getattr(layout, name)}" for name in NAMED if getattr(layout, name) > 1) or "dp only"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-ranks", type=one_or_more, default=8)
    parser.add_argument("--seed", type=int, default=0)
    asked, console = parser.parse_args(), Console(width=110)
    places = [layout for world in PROPERTIES if world <= asked.max_ranks for layout in all_layouts(world)]
    trials, rows = Trials(plants=known.mends()), []
    for number, layout in enumerate(places):
        case = drawn(layout, asked.seed + number)
        began = time.perf_counter()
        verdict = trials.judge(case)
        rows.append((layout, time.perf_counter() - began, verdict))
        console.print(f"{layout.world:2} ranks  {named(layout):<28} {rows[-1][1]:6.2f} s  {said(verdict)}")
        if verdict.violation:
            console.print(str(verdict.violation), highlight=False, soft_wrap=True, markup=False)
    trials.close()
    show(rows, console)
    return int(any(verdict.violation for _, _, verdict in rows))


if __name__ == "__main__":
    sys.exit(main())
