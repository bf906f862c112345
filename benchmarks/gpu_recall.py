"""Planted bugs on a host with GPUs: `python benchmarks/gpu_recall.py --seconds 240`, all or one of several `--parts`.

For one bug after the other the covering rows of the smallest worlds that can show it, until one breaks a law that it
does not break without the bug. What holds without is tried once for all bugs. Prints a line for each, and a table; exit
code 1 where a bug was not found within `--rows` rows.
"""

import argparse
import sys
import time
from contextlib import closing
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from fuzz import device, known, plants
from fuzz.case import Case, HarnessFault
from fuzz.hunt import rows_in_turn
from fuzz.plants import Plant
from fuzz.recalled import minimal_layout
from fuzz.trial import Trials
from toy_models.spec import Layout


class Healthy:
    """Pools without a bug: each case once."""

    def __init__(self) -> None:
        self.trials, self.laws = Trials(plants=known.mends()), dict[Case, str]()

    def law(self, case: Case) -> str:
        if case not in self.laws:
            violation = self.trials.judge(case).violation
            self.laws[case] = violation.law if violation else ""
        return self.laws[case]


def searched(bug: Plant, cases: list[Case], healthy: Healthy) -> tuple[str, int]:
    """The law that found it, '' where none did, and after how many cases."""
    with closing(Trials(plants=(*known.mends(), bug.plant))) as planted:
        for number, case in enumerate(cases, 1):
            violation = planted.judge(case).violation
            if violation is not None and not healthy.law(case):
                return violation.law, number
    return "", len(cases)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--rows", type=int, default=12, help="rows that are tried for one bug")
    parser.add_argument("--bugs", default="", metavar="A,B", help="only these, by id")
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--precision", default="", help="of all rows; as they have it unless given")
    asked, console = parser.parse_args(), Console(width=118)
    device.choose()
    console.print("\n".join(device.told()), markup=False)
    sizes = {bug.id: (minimal_layout(bug) or Layout()).world for bug in plants.in_package()}
    named = set(filter(None, asked.bugs.split(","))) or set(sizes)
    bugs = [bug for bug in plants.in_package() if sizes[bug.id] <= 2 and bug.id in named][asked.part :: asked.parts]
    rows = [row.case for row in rows_in_turn()]
    if asked.precision:
        rows = [replace(case, precision=asked.precision) for case in rows]
    until, table, healthy = time.monotonic() + asked.seconds, Table("bug", "law", "cases", "seconds"), Healthy()
    missed = 0
    for bug in bugs:
        if time.monotonic() > until:
            break
        began = time.monotonic()
        cases = [case for case in rows if sizes[bug.id] <= case.layout.world <= 2][: asked.rows]
        try:
            law, number = searched(bug, cases, healthy)
        except HarnessFault as fault:
            law, number = f"FAULT {str(fault)[:300]}", 0
        missed += not law or law.startswith("FAULT")
        took = f"{time.monotonic() - began:.1f}"
        console.print(f"{bug.id}: {law or 'not found'} ({number} cases, {took} s)", markup=False, soft_wrap=True)
        table.add_row(bug.id, law or "not found", str(number), took)
    healthy.trials.close()
    console.print(table)
    alarms = {law for law in healthy.laws.values() if law}
    console.print(
        f"{table.row_count - missed} of {table.row_count} found; "
        f"{len(healthy.laws)} cases without a bug: {alarms or 'no alarm'}"
    )
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
