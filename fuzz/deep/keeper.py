"""Outlives a driver and ends what its Ray leaves: Ray's agents stay for up to a minute where a driver is killed.

It looks at what is below the driver, again and again; when the driver's pipe closes without a farewell, it ends what is
still there. Knows processes, and nothing else.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

import psutil

EVERY = 1.0  # seconds between two looks: some ms each
AFTER = 3.0  # seconds that Ray has to end by itself
PROGRAM = f"from {__name__} import keep; keep()"


class Keeper:
    """A process that waits for the end of this one."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", PROGRAM]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def dismiss(self) -> None:
        """This process has cleaned up itself."""
        self._process.communicate(b".")


def keep() -> None:
    """What the keeper does."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    parent, seen = os.getppid(), dict[int, float]()
    while not select.select([sys.stdin], [], [], EVERY)[0]:
        seen |= _below(parent)
    if sys.stdin.buffer.read(1):
        return
    for pid in list(seen):
        seen |= _below(pid)
    time.sleep(AFTER)
    for pid, began in seen.items():
        _end(pid, began)


def _below(pid: int) -> dict[int, float]:
    """What is below a process, but for this one, and when each began."""
    with contextlib.suppress(psutil.Error):
        children = psutil.Process(pid).children(recursive=True)
        return {one.pid: one.create_time() for one in children if one.pid != os.getpid()}
    return {}


def _end(pid: int, began: float) -> None:
    """End a process, if it is the one that had this number."""
    with contextlib.suppress(psutil.Error):
        one = psutil.Process(pid)
        if one.create_time() == began:
            one.kill()
