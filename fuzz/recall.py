"""`python -m fuzz recall`: would the suite have caught this bug? Plants one after the other, searches, shrinks, counts.

Knows what can be planted, the search for one bug (`fuzz.hunt`) and how processes share the bugs out. What is written of
it is `fuzz.recalled`'s; options and their spelling are `fuzz.__main__`'s.
"""

import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fuzz import known, plants
from fuzz.case import HarnessFault
from fuzz.plants import Plant
from fuzz.recalled import Control, Recall, minimal_layout, write
from fuzz.replay import flat, start

if TYPE_CHECKING:
    from fuzz.hunt import Recalled
    from fuzz.rows import Row
    from fuzz.trial import Trials

INTERRUPTED = 130  # 128 + SIGINT
EVERY = 20.0  # seconds between two plain lines of one search


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line asks for; `bugs` are ids or names of functions, none for all."""

    files: tuple[str, ...] = ()
    bugs: tuple[str, ...] = ()
    seconds: float = 60.0
    shrink_seconds: float = 60.0
    jobs: int = 1
    json: str = ""


def chosen(asked: Asked) -> list[Plant]:
    """The bugs that are asked for. ValueError, in one line, where a file has none or a name is unknown."""
    every = [bug for file in asked.files for bug in plants.in_file(file)] or plants.in_package()
    for name in asked.bugs:
        if not any(_is(bug, name) for bug in every):
            raise ValueError(f"--bugs={name} names no bug; there are {', '.join(bug.id for bug in every)}")
    kept = [bug for bug in every if not asked.bugs or any(_is(bug, name) for name in asked.bugs)]
    for bug in kept:
        minimal_layout(bug)
    return list(dict.fromkeys(kept))


def _is(bug: Plant, name: str) -> bool:
    return name in (bug.id, bug.plant.rpartition(":")[2])


def run(asked: Asked) -> int:
    """Search for every bug and say what was found; the exit code: 2 where one could not be planted, 1 where one was
    not found or the healthy system was accused, 130 after Ctrl-C, else 0.
    """
    bugs = chosen(asked)
    start()
    from fuzz.hunt import rows_in_turn

    with _Told(len(bugs)) as told:
        told.now("finding the covering rows")
        recall = _recalled(bugs, rows_in_turn(), asked, told)
    if not recall.results:  # interrupted before the first
        raise KeyboardInterrupt
    code = write(recall, asked.json)
    return INTERRUPTED if recall.untried else code


def _recalled(bugs: Sequence[Plant], rows: tuple["Row", ...], asked: Asked, told: "_Told") -> Recall:
    from fuzz.hunt import control

    done: dict[str, Recalled] = {}
    seen, untried = Control(0, ()), "the control"
    with closing(_healthy()) as healthy, contextlib.suppress(KeyboardInterrupt):  # what was done by then is kept
        share = _alone(bugs, rows, asked, healthy, told) if asked.jobs == 1 else _shared(bugs, rows, asked)
        for one in share:
            done[one.id] = one
            told.done(one)
        number = sum(one.cases for one in done.values())
        told.now(f"control: {number} cases without a bug")
        ran, alarms = control(healthy, rows, number, partial(told.cases, f"control of {number}"))
        seen, untried = Control(ran, tuple(alarms)), ""
    tried = tuple(bug for bug in bugs if bug.id in done)
    left = len(bugs) - len(tried)
    return Recall(
        tried,
        tuple(done[bug.id] for bug in tried),
        seen,
        asked.seconds,
        f"{left} of {len(bugs)} bugs and {untried}" if left else untried,
    )


def _healthy() -> "Trials":
    """Pools without a bug, warm over all bugs: what a case gives there depends on the case alone."""
    from fuzz.trial import Trials

    return Trials(plants=known.mends())


def _alone(
    bugs: Sequence[Plant], rows: tuple["Row", ...], asked: Asked, healthy: "Trials", told: "_Told"
) -> Iterator["Recalled"]:
    for bug in bugs:
        told.now(bug.id)
        yield hunted(bug, rows, asked, healthy, partial(told.cases, bug.id))


def hunted(
    bug: Plant, rows: tuple["Row", ...], asked: Asked, healthy: "Trials", progress: Callable[[int], None]
) -> "Recalled":
    """The search for one bug, in pools of its own."""
    from fuzz.hunt import Hunt, Recalled
    from fuzz.trial import Trials

    try:
        with closing(Trials(plants=(*known.mends(), bug.plant))) as planted:
            return Hunt(planted, healthy, rows, asked.seconds, asked.shrink_seconds, progress).run(bug.id)
    except HarnessFault as fault:
        return Recalled(id=bug.id, fault=_reason(fault))


def _reason(fault: HarnessFault) -> str:
    """One line: why it could not be planted, or else the first of the fault."""
    first, _, last = str(fault).partition("could not be planted: ")
    return flat(f"could not be planted: {last.splitlines()[0]}" if last else first.splitlines()[0], 300)


# ---- several at once -------------------------------------------------------------------------------------------


class _Worker:
    """A process with a fork server and pools of its own, and the bug that it has been given."""

    def __init__(self, rows: tuple["Row", ...], asked: Asked) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.bug: Plant | None = None
        self._process = context.Process(target=_work, args=(theirs, rows, asked))
        self._process.start()
        theirs.close()

    def give(self, waiting: list[Plant]) -> None:
        """The next bug, if there is one."""
        self.bug = waiting.pop(0) if waiting else None
        if self.bug:
            self.pipe.send(self.bug)

    def answer(self, bug: Plant) -> "Recalled":
        """What became of its bug; a fault where the process has ended."""
        from fuzz.hunt import Recalled

        try:
            return self.pipe.recv()  # type: ignore[no-any-return]
        except (EOFError, OSError):
            return Recalled(id=bug.id, fault="the process that searched for it has ended")

    def close(self) -> None:
        self.pipe.close()
        self._process.join(10.0)
        self._process.terminate()


def _shared(bugs: Sequence[Plant], rows: tuple["Row", ...], asked: Asked) -> Iterator["Recalled"]:
    """The bugs shared out among processes, in the order in which they are through."""
    waiting, workers = list(bugs), [_Worker(rows, asked) for _ in range(min(asked.jobs, len(bugs)))]
    try:
        for worker in workers:
            worker.give(waiting)
        while busy := [worker for worker in workers if worker.bug]:
            ready = wait([worker.pipe for worker in busy])
            for worker in busy:
                if worker.pipe in ready and worker.bug:
                    yield worker.answer(worker.bug)
                    with contextlib.suppress(OSError):
                        worker.give(waiting)
    finally:
        for worker in workers:
            worker.close()


def _work(pipe: Connection, rows: tuple["Row", ...], asked: Asked) -> None:
    """In a process of its own: answer for one bug after the other until the pipe is closed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    start()
    with closing(_healthy()) as healthy, contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            pipe.send(hunted(pipe.recv(), rows, asked, healthy, lambda cases: None))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)  # the keeper ends the ranks


# ---- progress --------------------------------------------------------------------------------------------------


class _Told:
    """How far it is, on stderr: a bar on a terminal; elsewhere a line for each bug, and now and then one within."""

    def __init__(self, bugs: int) -> None:
        self._console = Console(stderr=True)
        columns = (SpinnerColumn(), TextColumn("recall"), BarColumn(bar_width=20), MofNCompleteColumn())
        more = (TimeElapsedColumn(), TextColumn("{task.fields[now]}"))
        self._bar = Progress(*columns, *more, console=self._console, transient=True)
        self._task = self._bar.add_task("", total=bugs, now="")
        self._said = time.monotonic()

    def __enter__(self) -> "_Told":
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def now(self, text: str) -> None:
        """What is being done."""
        if self._console.is_terminal:
            self._bar.update(self._task, now=text)
        elif time.monotonic() - self._said > EVERY:
            self._say(text)

    def cases(self, what: str, number: int) -> None:
        """How many cases have run."""
        self.now(f"{what}: {number} cases")

    def done(self, one: "Recalled") -> None:
        """A bug is through."""
        self._bar.advance(self._task)
        self._say(f"{one.id}: {one.told()}")

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
