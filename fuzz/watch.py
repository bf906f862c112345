"""Tells, from outside, ranks that work from ranks that wait for ever: by their signs of life, records and processes.

Knows process ids, the files of `fuzz.pulse` and seconds. Knows nothing of pipes, of what a case is, or of laws.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from fuzz import lockstep, pulse

TICK = 0.05  # seconds between two looks
EXPLAINED = 0.5  # seconds without a sign of life after which the record is asked why
AWAY = 1.0  # seconds between two looks that show that this process itself was stopped or starved
LONGEST = 12.0  # times the patience that ranks may be busy with one case, signs of life or not
LEAST_SHARE = 0.1  # of one processor: what could run and got less was starved


@dataclass(frozen=True)
class Stall:
    """Why the silent ranks are given up. `starved`: they were kept from running, so nothing can be said of them."""

    why: str
    quiet: float  # seconds since the last sign of life
    waits: tuple[lockstep.Divergence, ...] = ()
    starved: bool = False


class Watch:
    """Watches the ranks of one case, from now on. `patience`: seconds without a sign of life that are not explained."""

    def __init__(self, folder: Path, pids: Sequence[int], patience: float) -> None:
        self._folder, self._pids, self._patience = folder, pids, patience
        self._began = self._looked = self._since = time.monotonic()
        self._seen: object = None
        self._used: Mapping[int, float] | None = None

    def look(self, ended: Mapping[int, str]) -> Stall | None:
        """A Stall where the ranks that have not ended are given up; `ended` says how the others did: done, raised."""
        now = time.monotonic()
        if now - self._looked > AWAY:
            self._since, self._began = self._since + now - self._looked, self._began + now - self._looked
        self._looked = now
        beats = {rank: pulse.beat(self._folder, rank) for rank in range(len(self._pids)) if rank not in ended}
        if (beats, set(ended)) != self._seen:
            self._seen, self._since, self._used = (beats, set(ended)), now, None
        return self._judge(beats, ended, now)

    def _judge(self, beats: Mapping[int, pulse.Beat], ended: Mapping[int, str], now: float) -> Stall | None:
        quiet = now - self._since
        if now - self._began > LONGEST * self._patience:
            return Stall(f"they were still busy after {now - self._began:.3g} s", quiet)
        if quiet < EXPLAINED:
            return None
        if self._used is None:  # once per silence
            self._used = {rank: _processor_time(self._pids[rank]) for rank in beats}
            if waits := self._standstill(beats, ended):
                return Stall(f"nobody can go on: {waits[0]}", quiet, tuple(waits))
        return self._at_last(beats, ended, quiet) if quiet >= self._patience else None

    def _standstill(
        self, beats: Mapping[int, pulse.Beat], ended: Mapping[int, str], patient: bool = False
    ) -> list[lockstep.Divergence]:
        record = {rank: recorded(self._folder, rank) for rank in range(len(self._pids))}
        inside = {rank: (beats.get(rank) or pulse.beat(self._folder, rank)).inside for rank in record}
        return lockstep.standstill(record, inside, ended, patient)

    def _at_last(self, beats: Mapping[int, pulse.Beat], ended: Mapping[int, str], quiet: float) -> Stall:
        assert self._used is not None
        used = {rank: _processor_time(self._pids[rank]) - before for rank, before in self._used.items()}
        kept = [
            why for rank in used if (why := _kept_from_running(rank, self._pids[rank], used[rank], quiet - EXPLAINED))
        ]
        if kept:
            return Stall("; ".join(kept), quiet, starved=True)
        if waits := self._standstill(beats, ended, patient=True):
            return Stall(f"nobody can go on: {waits[0]}", quiet, tuple(waits))
        return Stall(f"no rank gave a sign of life for {quiet:.3g} s", quiet)


def recorded(folder: Path, rank: int) -> list[lockstep.Call]:
    """The calls that a rank has made."""
    return [lockstep.parsed(line) for line in pulse.calls(folder, rank)]


def _processor_time(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def _kept_from_running(rank: int, pid: int, used: float, seconds: float) -> str:
    """Why a silence of this rank says nothing; '' where it had its chance."""
    try:
        status = psutil.Process(pid).status()
    except psutil.Error:
        return ""
    if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_DISK_SLEEP):
        return f"rank {rank} was kept from running: process {pid} is in state {status}"
    if status == psutil.STATUS_RUNNING and used < LEAST_SHARE * seconds:
        return f"rank {rank} was kept from running: {used:.2g} s of processor time in {seconds:.3g} s"
    return ""
