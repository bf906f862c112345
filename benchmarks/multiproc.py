"""The same step function under PyTorch's own `MultiProcContinuousTest`: `python benchmarks/multiproc.py WORLD`.

One test per case of `benchmarks/cases.json`, in processes that stay up for the class. Started by `benchmarks/bench.py`;
prints JSON: seconds of every test, and of the whole run with its start. Nothing is judged, and there is no reference.
"""

import json
import sys
import tempfile
import time
import unittest
from pathlib import Path
from typing import Any

import torch
from torch.testing._internal.common_distributed import MultiProcContinuousTest

sys.path.insert(0, str(Path(__file__).parent))

from drawn import listed

from fuzz import drive, known
from fuzz.case import twin_of

BEGAN = time.perf_counter()
WORLD = int(sys.argv[1]) if len(sys.argv) > 1 else 2
CASES = listed(WORLD)


class Steps(MultiProcContinuousTest):
    """PyTorch's harness: it spawns `world_size` processes once and sends them the name of each test."""

    world_size = WORLD

    @classmethod
    def _init_pg(cls, rank: int, world_size: int, rdvz_file: str) -> None:
        torch.set_num_threads(1)  # it leaves as many threads as there are cores to every process
        folder = Path(rdvz_file + "-wire")
        folder.mkdir(exist_ok=True)
        drive.start(rank, world_size, str(folder / "store"), known.mends())


def _test(number: int) -> Any:
    def test(self: Steps) -> None:
        for case in [CASES[number], *([twin_of(CASES[number])] if CASES[number].twin else [])]:
            drive.step(lambda stage: None, case)

    return test


for number in range(len(CASES)):
    setattr(Steps, f"test_{number:03d}", _test(number))


class Clock(unittest.TestResult):
    """Remembers when tests end."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def startTest(self, test: unittest.TestCase) -> None:
        self._began = time.perf_counter()
        super().startTest(test)

    def stopTest(self, test: unittest.TestCase) -> None:
        self.seconds.append(time.perf_counter() - self._began)
        super().stopTest(test)


if __name__ == "__main__":
    tempfile.tempdir = tempfile.mkdtemp()
    clock = Clock()
    unittest.defaultTestLoader.loadTestsFromTestCase(Steps).run(clock)
    assert clock.wasSuccessful(), (clock.errors or clock.failures)[0][1]
    print(json.dumps({"seconds": clock.seconds, "whole": time.perf_counter() - BEGAN}))
