"""Outlives a driver and ends what its Ray leaves: Ray's agents stay for up to a minute where a driver is killed.

Ray makes the driver the leader of a process group, in which its own processes are. Knows that group, and nothing else.
"""

import os
import subprocess
import sys

AFTER = 2.0  # seconds that Ray has to end by itself
PROGRAM = f"""
import contextlib, os, signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
if not sys.stdin.buffer.read(1):
    time.sleep({AFTER})
    with contextlib.suppress(ProcessLookupError):
        os.killpg(int(sys.argv[1]), signal.SIGKILL)
"""


class Keeper:
    """A process that waits for the end of this one."""

    def __init__(self) -> None:
        command = [sys.executable, "-I", "-S", "-c", PROGRAM, str(os.getpid())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def dismiss(self) -> None:
        """This process has cleaned up itself."""
        self._process.communicate(b".")
