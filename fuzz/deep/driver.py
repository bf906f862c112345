"""`python -m fuzz deep`: starts the shards of a campaign, looks after them, says what they find, ends them in time.

Knows the cluster, the campaign's lock and what can be read of it; nothing of cases and of Hypothesis. Options and their
spelling are `fuzz.deep.options`'.
"""

import contextlib
import os
import platform
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console

from fuzz import known
from fuzz.deep import arms, campaign, cluster, database, reading, schema
from fuzz.deep.bar import Bar
from fuzz.deep.keeper import Keeper
from fuzz.deep.ledger import Plan, Told

LEAST = 20.0  # seconds: a shard starts in some 15 s, and its first case must fit in
GRACE = 90.0  # seconds after the budget for what is found to be written down
PATIENCE = 5  # times that one shard may be lost within WITHIN seconds
WITHIN = 300.0
TICK = 1.0
INTERRUPTED = 130  # 128 + SIGINT
PACKAGES = ("megatron-core", "torch", "transformers", "hypothesis", "ray")
ROOT = Path(".fuzz") / "deep"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line asks for. `shards` 0: as many as there is room for; `folder` None: a new one."""

    budget: float
    address: str = ""
    shards: int = 0
    max_ranks: int = 8
    gpus_per_rank: float = 0.0
    folder: Path | None = None
    database: str = ""
    seed: int = 0
    chunk: int = arms.CHUNK
    only: tuple[str, ...] = ()
    shrink_seconds: float = 60.0
    plants: tuple[str, ...] = ()
    known: bool = True


def run(asked: Asked) -> int:
    """Run a campaign, or go on with it; the exit code: 1 where a law was violated, 2 for a fault of the harness, 130
    after Ctrl-C, else 0. ValueError, in one line, for what cannot be run.
    """
    folder = asked.folder or ROOT / datetime.now().strftime("%Y-%m-%d-%H%M%S")
    _check_budget(asked.budget, folder)
    _check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as ending:  # in reverse: Ray, its keeper, the lock
        ending.enter_context(contextlib.closing(campaign.Lock(folder / "lock")))
        database.opened(asked.database, folder / "examples", lambda _: None)
        ending.callback(Keeper().dismiss)
        ending.callback(cluster.left)
        cluster.joined(asked.address)
        running = ending.enter_context(contextlib.closing(_Run(asked, folder)))
        with _ended_by_signals():
            return running.to_the_end()


def _check_budget(budget: float, folder: Path) -> None:
    """ValueError where no case would fit into what is left of the budget."""
    spent = reading.spent(folder)
    if budget < LEAST:
        said = f"is too small for one case: shards start in some 15 s, so {LEAST:g}s is the least"
        raise ValueError(f"--budget {budget:g}s {said}")
    if budget - spent < LEAST:
        said = f"has spent {spent:.0f}s of its budget of {budget:g}s: a larger --budget goes on with it"
        raise ValueError(f"--campaign {folder} {said}")


def _check_folder(folder: Path) -> None:
    """ValueError where it is no campaign's, or one of another version; one that is damaged is mended by the ledger."""
    campaign.check(folder)
    if (folder / schema.NAME).exists():
        with contextlib.suppress(reading.Damaged):
            reading.read(folder)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM is Ctrl-C: what has finished is kept either way."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Run:
    """The time of one driver: ledger, shards, bar. ValueError where there is no room, or the campaign is refused."""

    def __init__(self, asked: Asked, folder: Path) -> None:
        self._folder, self._said = folder, len(reading.glance(folder).notes)  # those of earlier drivers were said
        needs = cluster.Needs(max_ranks=asked.max_ranks, gpus_per_rank=asked.gpus_per_rank)
        number = asked.shards or max(1, cluster.room(needs))
        cluster.check_room(needs, number)
        self._ledger = cluster.ledger(folder, _plan(asked, number))
        self._losses: dict[int, list[float]] = {shard: [] for shard in range(number)}
        examples = str((folder / "examples").resolve())
        names = ("gpus_per_rank", "shrink_seconds", "plants", "known", "database")
        told = Told(examples=examples, **{name: getattr(asked, name) for name in names})
        self._shards = cluster.Shards(number, needs, self._ledger, told)
        self._bar = Bar(Console(), asked.budget, number)
        self._ended = "interrupted"

    def to_the_end(self) -> int:
        """Until the time is up or nothing is left to do; the exit code."""
        self._bar.say(f"campaign {self._folder}: `python -m fuzz status {self._folder}` shows how far it is")
        try:
            self._look_after()
            self._ended = "done"
        except KeyboardInterrupt:
            self._bar.say("interrupted: what has finished is kept; the same command goes on with --campaign")
        self._shards.kill()
        self._show()
        self._bar.close()
        return self._code()

    def _look_after(self) -> None:
        until = time.monotonic() + max(0.0, cluster.asked(self._ledger, "beat")) + GRACE
        while self._shards.running():
            left = cluster.asked(self._ledger, "beat")
            for shard, why in self._shards.ended(TICK):
                self._gone(shard, why, left)
            if left <= 0:
                self._shards.give_up_waiting()
            self._show()
            if time.monotonic() > until:
                self._note("late", f"{self._shards.running()} shards had not ended {GRACE:g} s after the budget")
                return

    def _gone(self, shard: int, why: str, left: float) -> None:
        """A shard has ended: started again where it was lost, as long as that helps and there is time."""
        if not why:
            return
        cluster.asked(self._ledger, "lost", shard, why)
        now, losses = time.monotonic(), self._losses[shard]
        losses.append(now)
        if left > LEAST and sum(now - at < WITHIN for at in losses) <= PATIENCE:
            self._shards.start(shard)

    def _note(self, kind: str, text: str) -> None:
        cluster.asked(self._ledger, "note", kind, text)

    def _show(self) -> None:
        glance = reading.glance(self._folder, self._said)
        self._said += len(glance.notes)
        for kind, text in glance.notes:
            self._bar.say(f"{kind}: {text}")
        self._bar.show(glance, self._shards.running())

    def _code(self) -> int:
        glance = reading.glance(self._folder)
        faults = any(kind in ("fault", "late") for kind, _ in glance.notes) or not glance.cases
        if self._ended == "interrupted":
            return INTERRUPTED
        self._bar.say(reading.read(self._folder).verdict())
        return 1 if glance.failures else 2 if faults else 0

    def close(self) -> None:
        self._shards.kill()
        self._bar.close()
        cluster.closed(self._ledger, self._ended)


def _plan(asked: Asked, shards: int) -> Plan:
    return Plan(
        max_ranks=asked.max_ranks,
        budget=asked.budget,
        shards=shards,
        seed=asked.seed,
        size=asked.chunk,
        families=arms.FAMILIES,
        only=asked.only,
        environment=_environment() | {"database": database.told(asked.database), "plants": ", ".join(asked.plants)},
    )


def _environment() -> dict[str, Any]:
    versions = {name: metadata.version(name) for name in PACKAGES}
    supported = "" if known.version() in known.SUPPORTED else "not a supported megatron-core"
    machine = f"{platform.platform()}, {os.cpu_count()} processors"
    return {**versions, "Python": platform.python_version(), "machine": machine, "warning": supported}
