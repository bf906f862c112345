"""Kills drivers of one campaign at random moments, and looks at what is left: `python benchmarks/kills.py DIR`.

A row for each kill, after its first case or its start by turns: cases that had finished just before, cases in the log
afterwards, seconds until no process of it is left, whether the log is whole. The last driver may run to its end. Exit
code 1 where anything is lost.
"""

import argparse
import random
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import psutil
from asked import one_or_more

from fuzz.deep import reading, schema

FIRST = 60.0  # seconds to wait for a case
FEW = ("--max-ranks", "2", "--shards", "1", "--only", "property any_case 2", "--chunk", "50")


def started(folder: Path, budget: float, seed: int) -> subprocess.Popen[bytes]:
    asked = ["deep", "--budget", f"{budget:.0f}s", "--campaign", str(folder), "--seed", str(seed), *FEW]
    return subprocess.Popen([sys.executable, "-m", "fuzz", *asked], stdout=subprocess.DEVNULL)


def killed(folder: Path, seed: int, after: float, running: bool) -> tuple[int, int, float, bool]:
    """Cases before and after, seconds until nothing is left, whether the log is whole."""
    there, until = reading.glance(folder).cases, time.monotonic() + FIRST
    driver = started(folder, 100_000, seed)
    while running and reading.glance(folder).cases == there and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(after)
    below = psutil.Process(driver.pid).children(recursive=True)
    before = reading.glance(folder).cases
    driver.kill()
    began = time.monotonic()
    driver.wait()
    psutil.wait_procs(below, timeout=40)
    took = time.monotonic() - began if not any(one.is_running() for one in below) else float("inf")
    return before, reading.glance(folder).cases, took, not (folder / schema.NAME).exists() or _whole(folder)


def _whole(folder: Path) -> bool:
    with closing(schema.connect(folder / schema.NAME)) as db:
        return db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=one_or_more, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--last", type=float, default=25.0, help="seconds of the last driver; 0 for none")
    asked = parser.parse_args()
    chance, wrong = random.Random(asked.seed), False
    for n in range(asked.kills):
        running, after = n % 2 == 0, chance.uniform(0.5, 8.0)
        before, cases, left, whole = killed(asked.folder, n, after, running)
        wrong = wrong or cases < before or left == float("inf") or not whole
        when = "its first case" if running else "its start"
        row = f"killed {after:.1f} s after {when}: {before} cases, then {cases}; gone in {left:.1f} s; whole: {whole}"
        print(row, flush=True)
    if asked.last:
        code = started(asked.folder, reading.spent(asked.folder) + asked.last, 0).wait()
        seen = reading.read(asked.folder)
        print(
            f"last driver: exit code {code}, {sum(seen.kinds.values())} cases, {len(seen.sessions)} drivers, "
            f"{seen.faults} faults, {seen.seconds:.0f} s in all: {seen.verdict()}"
        )
        wrong = wrong or code != 0
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
