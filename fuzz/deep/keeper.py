"""Outlives a driver and ends what its Ray leaves: Ray's agents stay for up to a minute where a driver is killed.

The driver tells it, through a pipe, which processes there are below it; when the pipe closes without a farewell it ends
those that are still there. Knows processes, and nothing else.
"""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterable

import psutil

AFTER = 3.0  # seconds that Ray has to end by itself
FAREWELL = "farewell"
PROGRAM = f"from {__name__} import keep; keep()"


class Keeper:
    """A process that waits for the end of this one."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", PROGRAM]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, text=True)

    def note(self) -> None:
        """Remember what is below this process now."""
        self._say([(one.pid, one.create_time()) for one in _below() if one.pid != self._process.pid])

    def dismiss(self) -> None:
        """This process has cleaned up itself."""
        self._say(FAREWELL)
        self._process.communicate()

    def _say(self, what: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            assert self._process.stdin
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()


def _below() -> Iterable[psutil.Process]:
    return psutil.Process().children(recursive=True)


def keep() -> None:
    """What the keeper does."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    noted: dict[int, float] = {}
    for line in sys.stdin:
        if (said := json.loads(line)) == FAREWELL:
            return
        noted |= {pid: began for pid, began in said}
    time.sleep(AFTER)
    for pid, began in noted.items():
        with contextlib.suppress(psutil.Error):
            one = psutil.Process(pid)
            if one.create_time() == began:  # else another one that has its number now
                one.kill()
