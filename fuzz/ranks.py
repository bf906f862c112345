"""The processes that run a case: kept warm, watched, killed and built again. The only module that knows of them.

Knows processes, deadlines, deaths and private files; inside a rank is `fuzz.rank`, the fork is `fuzz.forking`.
Knows nothing of what a case is, of models, laws or megatron-core.

Calls and replies lie in files of the pool's private folder; through the pipe goes only the word that they are
there, so that no read or write of the parent can block on a rank that has stopped.
"""

import contextlib
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing import util
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from fuzz import endings, lockstep, pulse
from fuzz.case import HarnessFault, Observation
from fuzz.forking import CONTEXT, FAREWELL, PRELOAD, exists, fork, home, kill
from fuzz.rank import TEXT, Seat, Word, serve
from fuzz.watch import TICK, Stall, Watch

START = 30.0  # seconds without a sign of life from a pool that starts
USUAL = 0.5  # seconds from the fork to a pool that is ready, on two idle cores: what a machine takes longer, all takes
PATIENCE = 5.0  # seconds without a sign of life that the record of calls does not explain, on such a machine
MOST_PATIENCE = 12.0  # however slow the machine
LEAST_ROOM = 2**20  # bytes free where calls and replies lie: below, what ranks do is not what they would do


class Ranks:
    """`world` rank processes, kept warm between cases; killed and built again after a case that did not end well.

    `start`, "module:function", is called once in every rank as start(rank, world, store_path, plants) and makes its
    process group; None for a pool that needs none. `preload` names what must be importable in every rank. `patience`:
    seconds without a sign of life (a stage, a collective entered or left) after which ranks are given up; scaled with
    the machine. HarnessFault where a pool cannot be started. Not for use by several threads at once.
    """

    def __init__(
        self,
        world: int,
        *,
        start: str | None,
        plants: tuple[str, ...] = (),
        patience: float = PATIENCE,
        preload: tuple[str, ...] = PRELOAD,
    ) -> None:
        self.world, self.patience = world, patience
        self._seat = Seat(0, world, Path(), start, plants, preload)
        self._pool: Pool | None = None
        self._busy = False
        self._end: Callable[[], None] = lambda: None
        self._warm()

    def run(self, function: str, *args: Any, times_patience: float = 1.0) -> list[Observation]:
        """Call "module:function" in every rank as f(progress, *args): what each of them saw, or how it ended.

        f returns a dict with any of tensors, numbers, facts, seconds; HarnessFault where that cannot be had.
        """
        self.begin(function, *args)
        return self.finish(times_patience)

    def begin(self, function: str, *args: Any) -> None:
        """Let the ranks begin with a call; what they still do of an earlier one is broken off."""
        with self._closed_by_an_error():
            _check_room()
            if self._busy:
                self.close()
            pool = self._warm()
            self._busy = True
            pool.call(function, args)

    def finish(self, times_patience: float = 1.0) -> list[Observation]:
        """Wait for what `begin` began; patience counts from here."""
        with self._closed_by_an_error():
            assert self._busy and self._pool, "finish without begin"
            words, stall = _gather(self._pool, self.patience * self._slowness * times_patience)
            observations = endings.observations(self._pool, words, stall)
            self._busy = False
            if not _well(observations):
                _check_room()
                self.close()
        return observations

    @contextlib.contextmanager
    def _closed_by_an_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kill the ranks and remove their files; the next `run` builds the pool again."""
        self._pool, self._busy = None, False
        self._end()

    def _warm(self) -> "Pool":
        if self._pool is None or self._pool.news(range(self.world), 0):
            self.close()
            self._pool = self._build()
        return self._pool

    def _build(self) -> "Pool":
        folder = Path(tempfile.mkdtemp(prefix=f"world{self.world}-", dir=home()))
        pool = Pool(folder)
        self._end = util.Finalize(self, pool.kill, exitpriority=100)
        try:
            pool.start(replace(self._seat, rank=rank, folder=folder) for rank in range(self.world))
            began = time.monotonic()
            endings.check_started(pool, *_gather(pool, START))
            slowness = (time.monotonic() - began) / USUAL
            self._slowness = max(1.0, min(slowness, MOST_PATIENCE / PATIENCE))
        except BaseException:
            self._end()
            raise
        return pool


def _check_room() -> None:
    free = shutil.disk_usage(home()).free
    if free < LEAST_ROOM:
        raise HarnessFault(f"{home()} has {free:,} bytes free; ranks need {LEAST_ROOM:,}: make room and run again")


def _well(observations: list[Observation]) -> bool:
    """Whether the pool is as before: what a rank sent and nobody took would meet the next case."""
    done = all(observation.outcome == "done" for observation in observations)
    return done and lockstep.in_step({observation.rank: observation.calls for observation in observations})


@dataclass(eq=False)
class Pool:
    """The processes of one pool, their pipes and their private folder."""

    folder: Path
    killed_for_memory: int = field(default_factory=endings.kills_for_memory)
    processes: list[BaseProcess] = field(default_factory=list)
    pipes: list[Connection] = field(default_factory=list)

    def start(self, seats: Iterable[Seat]) -> None:
        theirs = []
        for seat in seats:
            ours, end = CONTEXT.Pipe()
            self.pipes.append(ours)
            theirs.append(end)
            self.processes.append(CONTEXT.Process(target=serve, args=(seat, end), daemon=True))
        fork(self.processes)
        for end in theirs:
            end.close()

    @property
    def pids(self) -> list[int]:
        """The processes by rank."""
        return [process.pid for process in self.processes]  # type: ignore[misc]

    def call(self, function: str, args: tuple) -> None:
        (self.folder / "call").write_bytes(pickle.dumps((function, args)))
        for rank, pipe in enumerate(self.pipes):
            pulse.clear(self.folder, rank, "called")
            with contextlib.suppress(OSError):  # it has just died: its sentinel says so
                pipe.send_bytes(b"call")

    def news(self, ranks: Iterable[int], seconds: float) -> list[int]:
        """Those of `ranks` that have said something or died, at the latest after `seconds`."""
        sources: dict[Any, int] = {source: r for r in ranks for source in (self.pipes[r], self.processes[r].sentinel)}
        return sorted({sources[source] for source in wait(list(sources), max(0.0, seconds))})

    def word(self, rank: int) -> Word:
        """What a rank with news has said, or its exit code (negative: a signal)."""
        with contextlib.suppress(EOFError, OSError):
            if self.pipes[rank].poll():
                return self.pipes[rank].recv()
        self.processes[rank].join(FAREWELL)
        if exists(self.processes[rank]):
            return (
                "fault",
                f"process {self.processes[rank].pid} is there, but its fork server was killed from outside",
            )
        return "died", self.processes[rank].exitcode

    def text(self, kind: str, rank: int) -> str:
        """The end of what a rank has left in its file."""
        with contextlib.suppress(OSError):
            return (self.folder / f"{kind}-{rank}").read_bytes().rstrip(b"\0").decode(errors="replace")[-TEXT:]
        return ""

    def kill(self) -> None:
        for process in self.processes:
            kill(process)
        for process in self.processes:
            process.join(FAREWELL)
        for pipe in self.pipes:
            pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _gather(pool: Pool, patience: float) -> tuple[dict[int, Word], Stall | None]:
    """The answers by rank; those that gave none are missing, and the Stall says why they were given up."""
    words: dict[int, Word] = {}
    watch = Watch(pool.folder, pool.pids, patience)
    while silent := set(range(len(pool.pipes))) - set(words):
        news = pool.news(silent, TICK)
        words |= {rank: pool.word(rank) for rank in news}
        endings.check_faults(words)
        if not news and (stall := watch.look({rank: kind for rank, (kind, _) in words.items()})):
            return words, stall
    return words, None
