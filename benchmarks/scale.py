"""What the ledger costs as shards grow in number: `python benchmarks/scale.py [--seconds 15] [--case 0.4] 2 4 8 16 32`.

Real Ray actors and the real ledger; a case is a sleep of the median of a campaign, and tells what a real one would:
what its shard met for the first time, its tally, no document. Prints a row for each number of shards: cases per second,
what a shard waits for the ledger, how busy the ledger is, bytes of the log per case.
"""

import argparse
import random
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fuzz import laws
from fuzz.deep import cluster, schema
from fuzz.deep.campaign import DONE, Record
from fuzz.deep.discovery import cell, met
from fuzz.deep.ledger import Plan
from fuzz.rows import covering

Cases = list[tuple[str, tuple]]


def record(where: str, new: tuple, seconds: float) -> Record:
    return Record(seconds=seconds, kind="case", cell=where, outcome="holds", new=new, tally=TALLY)


class Empty:
    """A shard whose cases sleep."""

    def run(self, number: int, ledger: Any, cases: Cases, median: float, seconds: float) -> list[float]:
        remote, order, known, waits = cluster.Remote(ledger), random.Random(number), set(), []
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            chunk = remote.next(number)
            for where, every in order.choices(cases, k=50):
                if time.monotonic() > until:
                    break
                time.sleep(median)
                new = tuple(one for one in every if one not in known)
                began = time.monotonic()
                remote.record(chunk.number, record(where, new, median))
                waits.append(time.monotonic() - began)
                known.update(new)
            remote.end(chunk.number, DONE)
        return waits


FIRED = {law: 1 for law in laws.NAMES}
TALLY = {"fired": FIRED, "vacuous": FIRED, "cases": {"all": 1}, "worlds": {"2": 1}}


def real_cases() -> Cases:
    """Layout and what is met, of the covering rows of up to 4 ranks."""
    rows = [row for world in (1, 2, 4) for row in covering(world)]
    return [(cell(row.case.layout), tuple(met(row.case, dict.fromkeys(laws.NAMES, 1), {}))) for row in rows]


def measured(shards: int, cases: Cases, median: float, seconds: float) -> str:
    """The row for one number of shards."""
    import ray

    with ExitStack() as ending:
        folder = Path(ending.enter_context(tempfile.TemporaryDirectory())) / "c"
        ledger = cluster.ledger(folder, Plan(max_ranks=8, budget=10 * seconds + 600, shards=shards))
        made: Any = ray.remote(Empty)
        actors = [made.options(num_cpus=0).remote() for _ in range(shards)]
        told = ray.put(cases)
        ray.get([actor.run.remote(n, ledger, told, median, 0.0) for n, actor in enumerate(actors)])  # all are up
        began, used = time.monotonic(), _processor(ray.get(ledger.pid.remote()))
        waits = ray.get([actor.run.remote(n, ledger, told, median, seconds) for n, actor in enumerate(actors)])
        took, busy = time.monotonic() - began, _processor(ray.get(ledger.pid.remote())) - used
        cluster.closed(ledger, "done")
        size = (folder / schema.NAME).stat().st_size
        for actor in actors:
            ray.kill(actor)
    every = sorted(wait for one in waits for wait in one)
    number, mid, late = len(every), statistics.median(every), every[int(0.99 * (len(every) - 1))]
    ideal = shards * seconds / median
    return (
        f"| {shards} | {number / took:.1f} | {number / ideal:.0%} | {1e3 * mid:.1f} ms | {1e3 * late:.0f} ms | "
        f"{busy / took:.0%} | {1e3 * busy / number:.1f} ms | {size / number / 1024:.1f} KiB |"
    )


def _processor(pid: int) -> float:
    import psutil

    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", type=int, nargs="+")
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--case", type=float, default=0.4)
    asked = parser.parse_args()
    cases = real_cases()
    cluster.joined("")
    print("| shards | cases/s | of the ideal | wait, median | wait, 99 % | ledger busy | per case | log per case |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for shards in asked.shards:
        print(measured(shards, cases, asked.case, asked.seconds), flush=True)
    cluster.left()


if __name__ == "__main__":
    main()
