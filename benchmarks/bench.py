"""How long a generated PPO case takes, all laws judged, beside the same cases with processes spawned per case.

`python benchmarks/bench.py [--cases 20] [--spawned 3] [--ranks 1,2,4]`: one table per run; ratios hold within one run.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from hypothesis import HealthCheck, given, settings
from rich.console import Console
from rich.table import Table

from fuzz import forking, known
from fuzz.case import Case
from fuzz.strategies import cases
from fuzz.trial import Trials, Verdict


def drawn(world: int, number: int) -> list[Case]:
    """The same `number` drawn cases every time; the smallest, which Hypothesis tries first, left out."""
    found: list[Case] = []

    @settings(max_examples=number + 1, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(cases(world=world))
    def collect(case: Case) -> None:
        found.append(case)

    collect()
    return found[1:]


def _timed(trials: Trials, case: Case) -> tuple[float, Verdict]:
    began = time.perf_counter()
    verdict = trials.judge(case)
    assert verdict.violation is None, verdict.violation
    return time.perf_counter() - began, verdict


def _in_spawned(rank: int, case: Case, store: str) -> None:
    import torch

    torch.set_num_threads(1)
    from fuzz import drive

    drive.start(rank, case.layout.world, store, known.mends())
    drive.step(lambda stage: None, case)


def spawned(case: Case) -> float:
    """Seconds for the ranks alone, each a freshly spawned process that imports everything: no reference, no laws."""
    context, began = multiprocessing.get_context("spawn"), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        arguments = [(rank, case, str(Path(folder) / "store")) for rank in range(case.layout.world)]
        processes = [context.Process(target=_in_spawned, args=each) for each in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            assert process.exitcode == 0, f"a spawned rank ended with {process.exitcode}"
    return time.perf_counter() - began


def memory() -> float:
    """PSS in GiB of this process and all that it has started."""
    me = psutil.Process()
    return sum(process.memory_full_info().pss for process in [me, *me.children(recursive=True)]) / 2**30


def _stages(verdicts: Sequence[Verdict]) -> dict[str, float]:
    names = {name for verdict in verdicts for name in verdict.seconds}
    return {name: statistics.median(v.seconds.get(name, 0.0) for v in verdicts) for name in sorted(names)}


def measure(trials: Trials, world: int, number: int, fresh: int) -> tuple[list[str], dict[str, float]]:
    """One row of the table, and the medians of the stages inside rank 0 and the reference."""
    chosen = drawn(world, number)
    timed = [_timed(trials, case) for case in chosen]
    seconds = [each for each, _ in timed]
    slow = statistics.median(map(spawned, chosen[:fresh])) if fresh else float("nan")
    median, p90 = statistics.median(seconds), statistics.quantiles(seconds, n=10)[-1]
    row = [str(world), str(number), f"{median:.2f}", f"{p90:.2f}", f"{slow:.2f}", f"{slow / median:.1f}"]
    return row, _stages([verdict for _, verdict in timed])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--spawned", type=int, default=3)
    parser.add_argument("--ranks", default="1,2,4")
    asked = parser.parse_args()
    began = time.perf_counter()
    forking.warm_up()
    trials = Trials(plants=known.mends())
    trials.judge(Case())
    first = time.perf_counter() - began
    columns = ("ranks", "cases", "median s", "p90 s", "spawned s", "ratio")
    table: Any = Table(*columns, title=f"first case after {first:.1f} s")
    console = Console(width=140)
    for world in map(int, asked.ranks.split(",")):
        row, stages = measure(trials, world, asked.cases, asked.spawned)
        table.add_row(*row)
        console.print(f"{world} ranks:", {name: round(value, 3) for name, value in stages.items()})
    console.print(table, f"memory (PSS, all processes): {memory():.2f} GiB")
    trials.close()


if __name__ == "__main__":
    main()
