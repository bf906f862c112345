"""What a rank publishes while it runs and what survives its death: its stage, its calls, the one it is in.

Two small files per rank. The rank writes, the parent reads; neither waits for the other. Knows nothing of processes,
of what a call is (a line of bytes) or of cases.
"""

import contextlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path

HEAD = struct.Struct("<qqq")  # how often anything was published; the call that it is in, or -1; how many it has issued
STAGE = 200  # bytes of a stage's name


@dataclass(frozen=True)
class Beat:
    """How far a rank has come: `published` grows with every sign of life, `inside` is the index of a call or -1."""

    published: int = 0
    inside: int = -1
    issued: int = 0
    stage: str = ""


class Pulse:
    """The writing end, in the rank. What cannot be written (a full disk) is passed over: `issued` then tells."""

    def __init__(self, folder: Path, rank: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT
        self._head = os.open(folder / f"pulse-{rank}", flags)
        self._calls = os.open(folder / f"calls-{rank}", flags)
        self.restart("start")

    def restart(self, stage: str) -> None:
        """Forget what was published: a new call of the parent begins."""
        self._published, self._inside, self._issued, self._end = 0, -1, 0, 0
        os.ftruncate(self._calls, 0)
        self.stage(stage)

    def stage(self, name: str) -> None:
        """The name of what begins now."""
        self._stage = name.encode()[:STAGE].ljust(STAGE, b"\0")
        self._publish(self._stage)

    def issue(self, line: bytes) -> int:
        """Add a call to the record: its index."""
        with contextlib.suppress(OSError):
            written = os.pwrite(self._calls, line + b"\n", self._end)
            self._end += written if written > len(line) else 0  # half a line on a full disk is overwritten
        self._issued += 1
        return self._issued - 1

    @property
    def issued(self) -> int:
        """How many calls are in the record."""
        return self._issued

    def enter(self, index: int) -> None:
        """From now on the rank is inside a call, and may wait there for others."""
        self._inside = index
        self._publish()

    def leave(self) -> None:
        """The rank is inside no call."""
        self._inside = -1
        self._publish()

    def _publish(self, stage: bytes = b"") -> None:
        self._published += 1
        with contextlib.suppress(OSError):
            os.pwrite(self._head, HEAD.pack(self._published, self._inside, self._issued) + stage, 0)


own: Pulse | None = None  # that of this process, where it is a rank


def clear(folder: Path, rank: int, stage: str) -> None:
    """Forget what an idle rank has published."""
    (folder / f"pulse-{rank}").write_bytes(HEAD.pack(0, -1, 0) + stage.encode().ljust(STAGE, b"\0"))
    (folder / f"calls-{rank}").write_bytes(b"")


def beat(folder: Path, rank: int) -> Beat:
    """What a rank has published last; the empty Beat where it has not come so far."""
    with contextlib.suppress(OSError, struct.error):
        head = (folder / f"pulse-{rank}").read_bytes()
        published, inside, issued = HEAD.unpack_from(head)
        return Beat(published, inside, issued, head[HEAD.size :].rstrip(b"\0").decode(errors="replace"))
    return Beat()


def calls(folder: Path, rank: int) -> list[bytes]:
    """The calls that a rank has issued, in order; the last line may be missing where the rank died while it wrote."""
    with contextlib.suppress(OSError):
        return (folder / f"calls-{rank}").read_bytes().split(b"\n")[:-1]
    return []
