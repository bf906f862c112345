"""How the run of each rank ended, as Observations: what it returned, raised, died of, or where it hangs.

Knows the words and files of a pool and signals for stacks. Knows nothing of how a pool is made, of cases or of laws.
"""

import contextlib
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from fuzz import pulse
from fuzz.case import HarnessFault, Observation
from fuzz.rank import MOST_BYTES, Word, unpacked
from fuzz.watch import Stall, recorded

STACKS = 1.0  # seconds for hung ranks to write their stacks: a few milliseconds
# Where the kernel counts what it killed for memory, in this control group: version 2, version 1.
KILLS = (Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control"))


class Pool(Protocol):
    """What is needed of a pool."""

    folder: Path
    killed_for_memory: int

    @property
    def pids(self) -> list[int]: ...
    def text(self, kind: str, rank: int) -> str: ...


def check_faults(words: Mapping[int, Word]) -> None:
    """HarnessFault where a rank says that ours is the fault."""
    for rank, (kind, what) in words.items():
        if kind == "fault":
            raise HarnessFault(f"rank {rank}: {what}")


def check_started(pool: Pool, words: Mapping[int, Word], stall: Stall | None) -> None:
    """HarnessFault where a rank of a new pool is not ready."""
    for rank in range(len(pool.pids)):
        kind, what = words.get(rank, ("silent", None))
        if kind == "died":
            raise HarnessFault(f"rank {rank} {_ending(what)} while it started:\n{pool.text('log', rank)}")
        if kind == "silent" and stall:
            stack = _stacks(pool, [rank])[rank]
            raise HarnessFault(f"rank {rank} did not start ({stall.why}); it was here:\n{stack}")


def observations(pool: Pool, words: Mapping[int, Word], stall: Stall | None) -> list[Observation]:
    """One for every rank; `stall` says why those without a word were given up."""
    _check_sizes({rank: what for rank, (kind, what) in words.items() if kind in ("done", "raised")})
    silent = [rank for rank in range(len(pool.pids)) if rank not in words]
    stacks = _stacks(pool, silent)
    return [
        _silent(pool, rank, stall, stacks[rank]) if stall and rank in stacks else _heard(pool, rank, *words[rank])
        for rank in range(len(pool.pids))
    ]


def _check_sizes(replies: dict[int, dict[str, Any]]) -> None:
    total = sum(reply["size"] for reply in replies.values())
    if total > MOST_BYTES:
        each = ", ".join(f"rank {r} {v['size']:,} (largest {v['largest']!r})" for r, v in sorted(replies.items()))
        raise HarnessFault(f"the observations of one case have {total:,} bytes of at most {MOST_BYTES:,}: {each}")


def _observed(pool: Pool, rank: int, outcome: str, **seen: Any) -> Observation:
    """With what survives every ending: the last stage and the calls."""
    beat, calls = pulse.beat(pool.folder, rank), recorded(pool.folder, rank)
    if beat.issued != len(calls):  # the disk was full
        seen["facts"] = {**seen.get("facts", {}), "calls_lost": beat.issued - len(calls)}
    return Observation(rank=rank, outcome=outcome, stage=beat.stage, calls=calls, inside=beat.inside, **seen)


def _heard(pool: Pool, rank: int, kind: str, what: Any) -> Observation:
    if kind == "died":
        return _died(pool, rank, what)
    return _observed(pool, rank, kind, **unpacked(pool.folder / f"reply-{rank}", what))


def _died(pool: Pool, rank: int, code: int) -> Observation:
    facts: dict[str, Any] = {"signal": signal.Signals(-code).name} if code < 0 else {"exit_code": code}
    if code == -signal.SIGKILL and kills_for_memory() > pool.killed_for_memory:
        facts["out_of_memory"] = True
    error = f"rank {rank} {_ending(code)}; the end of its output:\n{pool.text('log', rank)}"
    return _observed(pool, rank, "died", facts=facts, error=error)


def _ending(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


def kills_for_memory() -> int:
    """How many processes of this control group the kernel has killed when memory ran out; 0 where it does not say."""
    for file in KILLS:
        with contextlib.suppress(OSError, ValueError):
            counts = dict(line.split() for line in file.read_text().splitlines())
            return int(counts.get("oom_kill", 0))
    return 0


def _silent(pool: Pool, rank: int, stall: Stall, stack: str) -> Observation:
    waits = [one for one in stall.waits if one.rank == rank]
    outcome = "starved" if stall.starved else "hung"
    error = f"rank {rank} was given up: {stall.why}; it was here:\n{stack}"
    return _observed(
        pool, rank, outcome, facts={"stack": stack}, waits=waits, error=error, seconds={"quiet": stall.quiet}
    )


def _stacks(pool: Pool, ranks: list[int]) -> dict[int, str]:
    """The Python stacks of hung ranks, most recent call first; '' where a rank cannot even write that."""
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pool.pids[rank], signal.SIGUSR1)
    before, now, until = list[str](), [""] * len(ranks), time.monotonic() + STACKS
    while (now != before or not all(now)) and time.monotonic() < until:
        time.sleep(0.02)
        before, now = now, [pool.text("stack", rank) for rank in ranks]
    return dict(zip(ranks, now, strict=True))
