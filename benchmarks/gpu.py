"""Cases on a host with GPUs, world by world, judged by all laws: `python benchmarks/gpu.py --worlds 1,2,4,8`.

Of each world the covering rows and a row for every layout, mixed, until `--seconds` are spent or `--cases` are done.
Prints a line for each case, what was violated in full, then times, layouts and memory of the first GPU per world. Exit
code 1 where a law was broken.
"""

import argparse
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from itertools import chain, zip_longest
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from fuzz import device, known
from fuzz.case import Case, HarnessFault
from fuzz.rows import covering, with_layout
from fuzz.space import all_layouts
from fuzz.trial import Trials


def cases(world: int) -> list[Case]:
    """Covering rows and every layout, by turns."""
    layouts = [with_layout(layout, seed).case for seed, layout in enumerate(all_layouts(world))]
    pairs = zip_longest([row.case for row in covering(world)], layouts)
    return [case for case in chain.from_iterable(pairs) if case is not None]


def used_mib() -> str:
    """MiB in use on the first GPU, as the driver says; '' without one."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return ""


def judged(trials: Trials, world: int, asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    until = time.monotonic() + asked.seconds
    for case in cases(world)[asked.skip :][: asked.cases]:
        if time.monotonic() > until:
            return
        began = time.monotonic()
        try:
            verdict = trials.judge(case)
            said = str(verdict.violation or "") and f"VIOLATED {verdict.violation}"
            fired = {law for law, number in verdict.counts.items() if number}
        except (HarnessFault, Exception) as error:
            said, fired = f"FAULT {error}\n{traceback.format_exc(limit=-3)}", set()
        yield {"case": case, "seconds": time.monotonic() - began, "said": said, "fired": fired}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", default="1,2,4,8")
    parser.add_argument("--cases", type=int, default=1000, help="at most, of each world")
    parser.add_argument("--skip", type=int, default=0, help="cases of each world that are left out first")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each world")
    parser.add_argument("--device", default="")
    asked, console = parser.parse_args(), Console(width=118)
    device.choose(asked.device)

    console.print("\n".join(device.told()), markup=False)
    table = Table(
        "ranks", "cases", "layouts", "median s", "slowest s", "broken", "GPU MiB before", "with ranks", "after"
    )
    broken, laws = 0, set()
    for world in map(int, asked.worlds.split(",")):
        before, done = used_mib(), []
        trials = Trials(plants=known.mends())
        for one in judged(trials, world, asked):
            done.append(one)
            laws |= one["fired"]
            said = one["said"] and f"\n{one['said']}"
            console.print(
                f"{world} ranks {one['seconds']:6.2f} s {one['case'].layout}{said}", markup=False, soft_wrap=True
            )
        during = used_mib()
        trials.close()
        time.sleep(2)
        wrong = sum(bool(one["said"]) for one in done)
        times, layouts = [one["seconds"] for one in done] or [0.0], {one["case"].layout for one in done}
        row = (world, len(done), len(layouts), f"{median(times):.2f}", f"{max(times):.2f}", wrong)
        table.add_row(*map(str, row), before, during, used_mib())
        broken += wrong
    console.print(table)
    console.print(f"{len(laws)} laws fired: {', '.join(sorted(laws))}", markup=False)
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
