"""What Ray costs: the same shard with and without it: `python benchmarks/ray_overhead.py [--cases 60] [--times 2]`.

One shard, the same seeds, so the same cases on the same ranks; with Ray the shard is an actor and the ledger another,
without it both are this process. Compared are the seconds from the first finished case to the last, in turn.
"""

import argparse
import statistics
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path

from fuzz.deep import cluster, reading, shard
from fuzz.deep.ledger import Ledger, Plan, Told
from fuzz.deep.schema import connect

ONLY = ("property any_case 2",)


def plan(size: int) -> Plan:
    return Plan(max_ranks=2, budget=300.0, shards=1, seed=11, size=size, only=ONLY)


def plain(folder: Path, cases: int) -> None:
    ledger = Ledger(folder, plan(cases + 2))
    threading.Thread(target=_stop, args=(folder, cases, ledger), daemon=True).start()
    shard.run(0, ledger, Told(examples=str(folder / "examples")))


def _stop(folder: Path, cases: int, ledger: Ledger) -> None:
    """No chunk after this one, and this one ends at its next case."""
    while reading.glance(folder).cases < cases:
        time.sleep(0.2)
    ledger.stop()


def with_ray(folder: Path, cases: int) -> None:
    cluster.joined("")
    ledger = cluster.ledger(folder, plan(cases + 2))
    shards = cluster.Shards(1, cluster.Needs(max_ranks=2), ledger, Told(examples=str(folder / "examples")))
    while reading.glance(folder).cases < cases:
        shards.ended(0.2)
    shards.kill()
    cluster.closed(ledger, "done")
    cluster.left()


def between(folder: Path, cases: int) -> float:
    """Seconds from the first finished case to the last that is compared."""
    with closing(connect(folder / "campaign.db")) as db:
        times = [at for (at,) in db.execute("SELECT at FROM cases ORDER BY id LIMIT ?", (cases,))]
    return float(times[-1] - times[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=60)
    parser.add_argument("--times", type=int, default=2)
    asked = parser.parse_args()
    took: dict[str, list[float]] = {"plain": [], "ray": []}
    with tempfile.TemporaryDirectory() as place:
        for n in range(asked.times):
            for name, run in (("plain", plain), ("ray", with_ray)):
                run(folder := Path(place) / f"{name}{n}", asked.cases)
                took[name].append(between(folder, asked.cases))
                print(f"{name}: {took[name][-1]:.2f} s for {asked.cases} cases", flush=True)
    one, other = statistics.median(took["plain"]), statistics.median(took["ray"])
    print(f"with Ray {other / one - 1:+.1%}")


if __name__ == "__main__":
    main()
