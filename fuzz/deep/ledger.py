"""What shards talk to: the next chunk, a case that has finished, a failure to claim. The only writer of a campaign.

Runs where the folder is. Knows the campaign and the choice of chunks; nothing of Ray, Hypothesis, ranks.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fuzz.deep import arms
from fuzz.deep.arms import Arm, Pull
from fuzz.deep.campaign import EXHAUSTED, LOST, Campaign, Record


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Work for one shard: an arm, where in its rows, a seed for Hypothesis, and the seconds that are left."""

    number: int
    arm: Arm
    start: int
    seed: int
    size: int
    left: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a campaign may do. `only`: names of arms begin with one of these; none for all."""

    max_ranks: int
    budget: float
    shards: int
    seed: int = 0
    size: int = arms.CHUNK
    families: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Told:
    """What all shards are told. `database`: a folder, a Redis URL, or empty for `examples`, the campaign's folder.

    `gpus_per_rank` 0: ranks on the CPU.
    """

    gpus_per_rank: float = 0.0
    shrink_seconds: float = 60.0
    plants: tuple[str, ...] = ()
    known: bool = True
    database: str = ""
    examples: str = ""


class Ledger:
    """Opens the campaign and begins a session. ValueError as `Campaign`'s, or where no time is left."""

    def __init__(self, folder: Path, plan: Plan, patience: float = 0.0) -> None:
        self._campaign, self._plan, self._over = Campaign(folder, patience), plan, False
        every = arms.arms(plan.max_ranks, plan.families)
        self._arms = [arm for arm in every if not plan.only or arm.name.startswith(plan.only)]
        self._seed = self._campaign.described("seed", plan.seed)
        asked = {"max_ranks": plan.max_ranks, "budget": plan.budget, "shards": plan.shards, "seed": self._seed}
        self._campaign.describe(**asked, environment=dict(plan.environment))
        left = self._campaign.begin(plan.budget, plan.shards)
        self._until = time.monotonic() + left
        for warning in self._campaign.warnings:
            self._campaign.note("warning", warning)

    def warnings(self) -> list[str]:
        return self._campaign.warnings

    def pid(self) -> int:
        """Of the process that writes."""
        return os.getpid()

    def left(self) -> float:
        """Seconds of the budget."""
        return self._until - time.monotonic()

    def next(self, shard: int) -> Chunk | None:
        """The next chunk for a shard; None when the time is up, or nothing is left to do."""
        pulls = [_pull(*row) for row in self._campaign.pulls()]
        chosen = arms.choose(self._arms, pulls, self._plan.size)
        if chosen is None or self._over or self.left() <= 0:
            return None
        (arm, start), seed = chosen, self._seed + len(pulls)
        number = self._campaign.chunk(shard, arm.name, start, seed)
        return Chunk(number=number, arm=arm, start=start, seed=seed, size=self._plan.size, left=self.left())

    def end(self, chunk: int, how: str, why: str = "") -> None:
        """A chunk is over; `why` is kept where it is a fault of the harness."""
        self._campaign.end(chunk, how)
        if why:
            self._campaign.note("fault", why)

    def record(self, chunk: int, record: Record) -> int:
        return self._campaign.record(chunk, record)

    def claim(self, law: str, tensor: str, shard: int, layout: str, sentence: str) -> tuple[int, bool]:
        return self._campaign.claim(law, tensor, shard, layout, sentence)

    def keep(self, failure: int, folder: str, files: Mapping[str, bytes], layout: str, sentence: str) -> None:
        self._campaign.keep(failure, folder, files, layout, sentence)

    def found(self, failures: Sequence[int]) -> None:
        for failure in failures:
            self._campaign.found(failure)

    def lost(self, shard: int, why: str) -> None:
        """A shard has ended in the middle of its work."""
        self._campaign.lost(shard)
        self._campaign.note("lost", f"shard {shard}: {why}")

    def note(self, kind: str, text: str) -> None:
        self._campaign.note(kind, text)

    def beat(self) -> float:
        """The driver is there; the seconds that are left."""
        self._campaign.beat()
        return self.left()

    def stop(self) -> None:
        """No chunk after those that run."""
        self._over = True

    def close(self, ended: str) -> None:
        self._campaign.beat(ended)
        self._campaign.close()


def _pull(arm: str, start: int, seconds: float, worth: float, ended: str) -> Pull:
    return Pull(arm=arm, start=start, seconds=seconds, worth=worth, last=ended == EXHAUSTED, lost=ended == LOST)
