"""Faults to inject into real cases: which, on which rank, where, and the proof that it fired.

`armed` is planted once in every rank. It reads what to do at the start of every case, so that one pool can serve many
faults. The parent writes that with `Control`, and reads there who fired. Knows no verdicts.
"""

import contextlib
import ctypes
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from fuzz import pulse
from fuzz.lockstep import Call, parsed
from toy_models.planted.rewrite import wrap

PLANT = "tests.faults:armed"
PAUSE = 1.5  # seconds
MIB = 2**20


@dataclass(frozen=True)
class Fault:
    """`at`: "stage NAME", "collective N" (before it), "inside N" (once entered), "step N" (optimizer steps of both
    roles), or "end". Collectives are counted from 0, from the stage models on: groups are not made in every case.
    """

    kind: str
    rank: int
    at: str
    once: bool = False  # in one run only, as if it came from outside
    in_twin: bool = False  # not in the case itself


@dataclass(frozen=True)
class Fired:
    """A fault that went off: who, in which stage, in front of which call, and when on the clock of this machine."""

    kind: str
    rank: int
    stage: str
    call: str
    pid: int
    time: float


class Control:
    """The parent's hand on its ranks: one file that says what to do, one in which they write that it was done."""

    def __init__(self, pid: int | None = None, folder: Path | None = None) -> None:
        self.path = (folder or Path(tempfile.gettempdir())) / f"fault-{pid or os.getpid()}.json"
        self._fired = self.path.with_suffix(".fired")

    def arm(self, fault: Fault) -> None:
        """From the next case on; what fired before is forgotten."""
        self._fired.unlink(missing_ok=True)
        self.path.write_text(json.dumps(asdict(fault)))

    def disarm(self) -> None:
        self.path.unlink(missing_ok=True)
        self._fired.unlink(missing_ok=True)

    def fault(self) -> Fault | None:
        with contextlib.suppress(OSError):
            return Fault(**json.loads(self.path.read_text()))
        return None

    def tell(self, fired: Fired) -> None:
        with self._fired.open("a") as file:  # one write: ranks do not cut each other's lines
            file.write(json.dumps(asdict(fired)) + "\n")

    def fired(self) -> list[Fired]:
        """In order."""
        with contextlib.suppress(OSError):
            return [Fired(**json.loads(text)) for text in self._fired.read_text().splitlines()]
        return []


@contextlib.contextmanager
def injected(control: Control, fault: Fault) -> Iterator[None]:
    """Armed for the time being."""
    control.arm(fault)
    try:
        yield
    finally:
        control.path.unlink(missing_ok=True)


# ---- in a rank -------------------------------------------------------------------------------------------------


class Trigger:
    """Knows the fault of this case, and fires it where it is reached. One per rank."""

    def __init__(self) -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        self._control = Control(parent.pid)
        self._fault: Fault | None = None
        self._collectives = self._steps = 0
        self._stage, self._call = "", ""

    def case(self, original: Callable, progress: Callable[[str], None], case: Any, forced: Any = None) -> Any:
        fault = self._control.fault()
        wanted = fault is not None and not (fault.in_twin and case.twin) and not (fault.once and self._control.fired())
        self._fault, self._steps = fault if wanted else None, 0
        seen = original(lambda name: self._begin(progress, name), case, forced)
        self._reach("end")
        return seen

    def _begin(self, progress: Callable[[str], None], name: str) -> None:
        progress(name)
        self._stage = name
        self._collectives = 0 if name == "models" else self._collectives
        self._reach(f"stage {name}")

    def step(self, original: Callable, *args: Any) -> Any:
        self._reach(f"step {self._steps}")
        self._steps += 1
        return original(*args)

    def issue(self, original: Callable, own: pulse.Pulse, line: bytes) -> int:
        """In front of the record, so that what is called here stands in it."""
        number = self._collectives
        self._collectives += 1
        if self._stage not in ("", "groups"):
            self._reach(f"collective {number}", parsed(line))
        return original(own, line)

    def enter(self, original: Callable, own: pulse.Pulse, index: int) -> None:
        original(own, index)
        if self._stage not in ("", "groups"):
            self._reach(f"inside {self._collectives - 1}")

    def _reach(self, place: str, call: Call | None = None) -> None:
        fault = self._fault
        if fault is None or fault.at != place:
            return
        others = fault.kind == "missing"  # the odd one is who does nothing
        if (dist.get_rank() == fault.rank) != others:
            self._fault = None
            told = Fired(fault.kind, dist.get_rank(), self._stage, str(call or ""), os.getpid(), time.monotonic())
            self._control.tell(told)
            INJECT[fault.kind](call)


def armed() -> None:
    """The plant."""
    from fuzz import drive  # imports megatron, which the parent has no need of
    from toy_models import ppo

    trigger = Trigger()
    wrap(drive, "step", trigger.case)
    wrap(ppo, "_train", trigger.step)
    wrap(pulse.Pulse, "issue", trigger.issue)
    wrap(pulse.Pulse, "enter", trigger.enter)


# ---- what is injected ------------------------------------------------------------------------------------------


def _raise(call: Call | None) -> None:
    raise RuntimeError("injected on purpose")


def _exit(call: Call | None) -> None:
    os._exit(7)


def _read_null(call: Call | None) -> None:
    ctypes.string_at(0)


def _kill(call: Call | None) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop(call: Call | None) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _pause(call: Call | None) -> None:
    """Stopped from outside for a while, as by a debugger or a machine that swaps."""
    waker = subprocess.Popen(["sh", "-c", f"sleep {PAUSE}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)
    waker.wait()


def _loop(call: Call | None) -> None:
    while True:
        pass


def _starve(call: Call | None) -> None:
    """Idle priority, on one core with two loops of ordinary priority: it can run, and hardly does."""
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    for _ in range(2):  # they end with the process group of this rank
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
    time.sleep(0.3)
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    _loop(call)


def _leak(call: Call | None) -> None:
    """Keeps what it allocates until its limit, a little above what it has now."""
    limit = psutil.Process().memory_info().vms + 64 * MIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    kept = []
    while True:
        kept.append(torch.ones(MIB))


def _fill(call: Call | None) -> None:
    """No file of this process can grow any more, as on a full disk; what it prints is lost too."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    print("." * 8192, flush=True)


def _reduce(call: Call | None) -> None:
    """A reduction that this rank makes, and others do not; none of theirs has this type and shape."""
    resolved: Any = distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    group = resolved(call.group.split()[0]) if call else None
    dist.all_reduce(torch.zeros(13, dtype=torch.int8), group=group)


INJECT: dict[str, Callable[[Call | None], None]] = {
    "exception": _raise,
    "exit": _exit,
    "segfault": _read_null,
    "kill": _kill,
    "stop": _stop,
    "pause": _pause,
    "loop": _loop,
    "starve": _starve,
    "memory": _leak,
    "full disk": _fill,
    "mismatch": _reduce,
    "missing": _reduce,
}
