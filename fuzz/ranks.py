"""The processes that run a case: kept warm, watched, killed and built again. The only module that knows of them.

Knows processes, deadlines, deaths and private files; inside a rank is `fuzz.rank`, the fork is `fuzz.forking`.
Knows nothing of what a case is, of models, laws or megatron-core.

Calls and replies lie in files of the pool's private folder; through the pipe goes only the word that they are
there, so that no read or write of the parent can block on a rank that has stopped.
"""

import contextlib
import os
import pickle
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from multiprocessing import util
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from fuzz.case import HarnessFault, Observation
from fuzz.forking import CONTEXT, FAREWELL, PRELOAD, exists, fork, home, kill
from fuzz.rank import MOST_BYTES, STAGE, TEXT, Seat, Word, serve, unpacked

START = 30.0  # seconds from the fork to a pool that is ready: 0.2 to 0.5 on two idle cores
GRACE = 2.0  # seconds for the others once a rank has raised or died: they are likely to wait for it in a collective
STACKS = 1.0  # seconds for hung ranks to write their stacks: a few milliseconds


class Ranks:
    """`world` rank processes, kept warm between cases; killed and built again after a case that did not end well.

    `start`, "module:function", is called once in every rank as start(rank, world, store_path, plants) and makes its
    process group; None for a pool that needs none. `preload` names what must be importable in every rank. HarnessFault
    where a pool cannot be started. Not for use by several threads at once.
    """

    def __init__(
        self,
        world: int,
        *,
        start: str | None,
        plants: tuple[str, ...] = (),
        deadline: float = 60.0,
        preload: tuple[str, ...] = PRELOAD,
    ) -> None:
        self.world, self.deadline = world, deadline
        self._seat = Seat(0, world, Path(), start, plants, preload)
        self._pool: _Pool | None = None
        self._end: Callable[[], None] = lambda: None
        self._warm()

    def run(self, function: str, *args: Any) -> list[Observation]:
        """Call "module:function" in every rank as f(progress, *args): what each of them saw, or how it ended.

        f returns a dict with any of tensors, numbers, facts, seconds; HarnessFault where that cannot be had.
        """
        try:
            pool = self._warm()
            pool.call(function, args)
            observations = _observations(pool, _gather(pool, self.deadline), self.deadline)
        except BaseException:
            self.close()
            raise
        if any(observation.outcome != "done" for observation in observations):
            self.close()
        return observations

    def close(self) -> None:
        """Kill the ranks and remove their files; the next `run` builds the pool again."""
        self._pool = None
        self._end()

    def _warm(self) -> "_Pool":
        if self._pool is None or self._pool.news(range(self.world), 0):
            self.close()
            self._pool = self._build()
        return self._pool

    def _build(self) -> "_Pool":
        folder = Path(tempfile.mkdtemp(prefix=f"world{self.world}-", dir=home()))
        pool = _Pool(folder)
        self._end = util.Finalize(self, pool.kill, exitpriority=100)
        try:
            pool.start(replace(self._seat, rank=rank, folder=folder) for rank in range(self.world))
            _check_started(pool, _gather(pool, START))
        except BaseException:
            self._end()
            raise
        return pool


@dataclass(eq=False)
class _Pool:
    folder: Path
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

    def call(self, function: str, args: tuple) -> None:
        (self.folder / "call").write_bytes(pickle.dumps((function, args)))
        for rank, pipe in enumerate(self.pipes):
            (self.folder / f"stage-{rank}").write_bytes(b"called".ljust(STAGE, b"\0"))
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


# What the ranks say -------------------------------------------------------------------------------------------------


def _gather(pool: _Pool, seconds: float) -> dict[int, Word]:
    """The answers by rank; a rank that gave none is missing. Once one failed the others have GRACE left."""
    words: dict[int, Word] = {}
    until = time.monotonic() + seconds
    while silent := set(range(len(pool.pipes))) - set(words):
        news = pool.news(silent, until - time.monotonic())
        if not news:
            break
        words |= {rank: pool.word(rank) for rank in news}
        if any(words[rank][0] in ("raised", "died") for rank in news):
            until = min(until, time.monotonic() + GRACE)
        _check_faults(words)
    return words


def _check_faults(words: dict[int, Word]) -> None:
    for rank, (kind, what) in words.items():
        if kind == "fault":
            raise HarnessFault(f"rank {rank}: {what}")


def _check_started(pool: _Pool, words: dict[int, Word]) -> None:
    for rank in range(len(pool.pipes)):
        kind, what = words.get(rank, ("silent", None))
        if kind == "died":
            raise HarnessFault(f"rank {rank} {_ending(what)} while it started:\n{pool.text('log', rank)}")
        if kind == "silent":
            stack = _stacks(pool, [rank])[rank]
            raise HarnessFault(f"rank {rank} did not start within {START:g} s; it was here:\n{stack}")


def _observations(pool: _Pool, words: dict[int, Word], deadline: float) -> list[Observation]:
    _check_sizes({rank: what for rank, (kind, what) in words.items() if kind in ("done", "raised")})
    silent = [rank for rank in range(len(pool.pipes)) if rank not in words]
    stacks = _stacks(pool, silent)
    why = _why_silent(words, deadline)
    return [
        _hung(pool, rank, why, stacks[rank]) if rank in stacks else _heard(pool, rank, *words[rank])
        for rank in range(len(pool.pipes))
    ]


def _check_sizes(replies: dict[int, dict[str, Any]]) -> None:
    total = sum(reply["size"] for reply in replies.values())
    if total > MOST_BYTES:
        each = ", ".join(f"rank {r} {v['size']:,} (largest {v['largest']!r})" for r, v in sorted(replies.items()))
        raise HarnessFault(f"the observations of one case have {total:,} bytes of at most {MOST_BYTES:,}: {each}")


def _why_silent(words: dict[int, Word], deadline: float) -> str:
    failed = [f"rank {rank} {kind}" for rank, (kind, _) in sorted(words.items()) if kind != "done"]
    return f"{GRACE:g} s after {', '.join(failed)}" if failed else f"after the deadline of {deadline:g} s"


def _heard(pool: _Pool, rank: int, kind: str, what: Any) -> Observation:
    if kind == "died":
        return _died(pool, rank, what)
    seen = unpacked(pool.folder / f"reply-{rank}", what)
    return Observation(rank=rank, outcome=kind, stage=pool.text("stage", rank), **seen)


def _died(pool: _Pool, rank: int, code: int) -> Observation:
    stage, log = pool.text("stage", rank), pool.text("log", rank)
    facts = {"signal": signal.Signals(-code).name} if code < 0 else {"exit_code": code}
    error = f"rank {rank} {_ending(code)} at stage {stage!r}; the end of its output:\n{log}"
    return Observation(rank=rank, outcome="died", stage=stage, facts=facts, error=error)


def _ending(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


def _hung(pool: _Pool, rank: int, why: str, stack: str) -> Observation:
    stage = pool.text("stage", rank)
    error = f"rank {rank} had not answered {why}, at stage {stage!r}; it was here:\n{stack}"
    return Observation(rank=rank, outcome="hung", stage=stage, facts={"stack": stack}, error=error)


def _stacks(pool: _Pool, ranks: list[int]) -> dict[int, str]:
    """The Python stacks of hung ranks, most recent call first; '' where a rank cannot even write that."""
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pool.processes[rank].pid, signal.SIGUSR1)  # type: ignore[arg-type]
    before, now, until = list[str](), [""] * len(ranks), time.monotonic() + STACKS
    while (now != before or not all(now)) and time.monotonic() < until:
        time.sleep(0.02)
        before, now = now, [pool.text("stack", rank) for rank in ranks]
    return dict(zip(ranks, now, strict=True))
