"""What runs inside one rank process: it starts, waits for a call, answers, and leaves what survives its death.

Knows its own seat and its files. Knows nothing of the other ranks, of deadlines, of what a case is or of
megatron-core: what it calls and what must be importable it knows by name only. Counterpart of `fuzz.ranks`.
"""

import contextlib
import faulthandler
import gc
import importlib
import io
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from fuzz import pulse
from fuzz.tensors import Tensors, laid_out

MOST_BYTES = 64 * 2**20  # of observations, per case, over all ranks
TEXT = 6000  # characters of a traceback or of a log's tail

Word = tuple[str, Any]  # the kind of a message, and what comes with it


@dataclass(frozen=True)
class Seat:
    """What one rank is told when it is made."""

    rank: int
    world: int
    folder: Path
    start: str | None
    plants: tuple[str, ...]
    preload: tuple[str, ...]

    def file(self, kind: str) -> Path:
        """This rank's file: pid, log, stack or reply."""
        return self.folder / f"{kind}-{self.rank}"


def serve(seat: Seat, pipe: Connection) -> None:
    """Answer calls until the parent has gone or has closed the pool."""
    _settle(seat)
    own = pulse.own = pulse.Pulse(seat.folder, seat.rank)
    pipe.send(_started(seat))
    with contextlib.suppress(EOFError, OSError):  # the parent has gone, or has closed the pool
        while pipe.recv_bytes():
            os.ftruncate(1, 0)
            own.restart("called")
            pipe.send(_answer(seat, own.stage))


def _settle(seat: Seat) -> None:
    # A process group of its own: Ctrl-C is for the parent alone, and helpers that a case forks die with their rank.
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    seat.file("pid").write_text(str(os.getpid()))
    log = os.open(seat.file("log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    sys.stdout = sys.stderr = io.TextIOWrapper(_Log(log, "wb"), write_through=True)  # type: ignore[type-var]
    faulthandler.enable(file=2)
    faulthandler.register(signal.SIGUSR1, file=os.open(seat.file("stack"), os.O_WRONLY | os.O_CREAT))
    # Daemons may have no children, and saving a checkpoint forks a writer. Daemon or not matters to the parent only.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    gc.freeze()  # what was imported before the fork stays in pages shared with the fork server


class _Log(io.FileIO):
    """What a case prints to a full disk is lost, and no exception."""

    def write(self, text: Any) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)


def _started(seat: Seat) -> Word:
    doing = ""
    try:
        for name in seat.preload:  # the fork server passes over modules that it cannot import, without a word
            doing = f"import {name}"
            importlib.import_module(name)
        doing = f"call {seat.start}"
        if seat.start:
            _named(seat.start)(seat.rank, seat.world, str(seat.folder / "store"), seat.plants)
    except BaseException as error:
        return _fault(doing, error)
    return "ready", None


def _answer(seat: Seat, progress: Callable[[str], None]) -> Word:
    doing = "read the call"
    try:
        function, args = pickle.loads((seat.folder / "call").read_bytes())
        doing = f"import {function}"
        called = _named(function)
        outcome, seen = _outcome(called, progress, args)
        doing = f"pack what {function} returned"
        return outcome, _packed(seat, seen)
    except (Unwritten, Exhausted) as error:
        return "fault", str(error)
    except BaseException as error:
        return _fault(doing, error)


def _named(function: str) -> Callable:
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def _outcome(called: Callable, progress: Callable[[str], None], args: tuple) -> tuple[str, dict[str, Any]]:
    try:
        return "done", called(progress, *args)
    except BaseException as error:
        if any(said in _message(error) for said in NO_THREADS):
            raise Exhausted(f"{_message(error)}: no more threads here; {MORE_THREADS}") from error
        return "raised", {"facts": _cause(error), "error": _traced(error)}


def _fault(doing: str, error: BaseException) -> Word:
    return "fault", f"could not {doing}: {type(error).__name__}: {_message(error)}\n{_traced(error)}"


def _message(error: BaseException) -> str:
    try:
        return str(error)[:TEXT]
    except Exception as unprintable:
        return f"<its __str__ raised {type(unprintable).__name__}>"


def _traced(error: BaseException) -> str:
    return "".join(traceback.format_exception(type(error), error, error.__traceback__, limit=-12))[-TEXT:]


def _cause(error: BaseException) -> dict[str, Any]:
    """Exception type and message, the place of the raise, and the deepest place in megatron-core ('' if none)."""
    places = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
    inside = [place[place.rindex("megatron/core/") :] for place in places if "megatron/core/" in place]
    return {
        "exception": type(error).__name__,
        "message": _message(error),
        "raised_at": places[-1],
        "megatron": inside[-1] if inside else "",
    }


def _packed(seat: Seat, seen: dict[str, Any]) -> dict[str, Any]:
    """Write head and tensors into the reply file, one contiguous blob; the sizes go through the pipe."""
    unknown = set(seen) - {"tensors", "numbers", "facts", "seconds", "error"}
    assert not unknown, f"a rank returned {sorted(unknown)}; known are tensors, numbers, facts and seconds"
    tensors = seen.get("tensors", {})
    runs, pieces = [*zip(*laid_out(tensors), strict=True)] or [(), ()]
    *offsets, end = accumulate((_aligned(piece.nbytes) for piece in pieces), initial=0)
    kinds = [(str(piece.dtype)[6:], piece.numel(), at) for piece, at in zip(pieces, offsets, strict=True)]
    head = pickle.dumps({**seen, "tensors": (runs, kinds)})
    size = _aligned(len(head)) + end
    if size <= MOST_BYTES:
        with written(seat.file("reply"), size):
            _write(seat.file("reply"), head, offsets, pieces, size)
    largest = max(tensors, key=lambda name: tensors[name].nbytes, default="")
    return {"size": size, "head": len(head), "largest": largest}


# What the system says where a thread cannot be made, in words of C and of Python.
NO_THREADS = ("Resource temporarily unavailable", "can't start new thread")
MORE_THREADS = "raise the limit (ulimit -u, pids.max of the control group) or run fewer ranks (--max-ranks)"


class Exhausted(Exception):
    """The machine, not the system under test, came to its end."""


class Unwritten(Exception):
    """A disk is full, or may not be written to."""


@contextlib.contextmanager
def written(path: Path, size: int) -> Iterator[None]:
    """Unwritten where `size` bytes cannot be written to `path`."""
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        said = f"{path} could not be written: {error.strerror}; it has {size:,} bytes, and {free:,} are free there"
        raise Unwritten(said) from error


def _write(path: Path, head: bytes, offsets: list[int], pieces: Sequence[torch.Tensor], size: int) -> None:
    with path.open("wb") as file:
        file.write(head)
        for offset, piece in zip(offsets, pieces, strict=True):
            file.seek(_aligned(len(head)) + offset)
            file.write(piece.view(torch.uint8).numpy().data)
        file.truncate(size)


def _aligned(size: int) -> int:
    return -(-size // 16) * 16


def unpacked(path: Path, sizes: dict[str, Any]) -> dict[str, Any]:
    """What `_packed` was given, in the parent; the tensors are views of one buffer of their own."""
    blob = bytearray(sizes["size"])
    with path.open("rb") as file:
        file.readinto(blob)
    seen = pickle.loads(memoryview(blob)[: sizes["head"]])
    first, (runs, kinds) = _aligned(sizes["head"]), seen["tensors"]
    pieces = [_piece(blob, dtype, count, first + at) for dtype, count, at in kinds]
    return {**seen, "tensors": Tensors([*zip(runs, pieces, strict=True)])}


def _piece(blob: bytearray, dtype: str, count: int, offset: int) -> torch.Tensor:
    kind = getattr(torch, dtype)
    return torch.frombuffer(blob, dtype=kind, count=count, offset=offset) if count else torch.empty(0, dtype=kind)
