"""Another program with a deadline: whatever it starts ends with it. Knows nothing of cases."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path


def run(
    asked: list[str], folder: Path, seconds: float, environment: Mapping[str, str] | None = None
) -> tuple[int | None, str]:
    """The exit code of a program started in `folder`, None where it took longer than `seconds`, and what it said.

    With an `environment` the variables by which Python finds packages are those alone.
    """
    here = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    started = subprocess.Popen(
        asked,
        cwd=folder,
        env=None if environment is None else {**here, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = started.communicate(timeout=seconds)
        return started.returncode, said
    except subprocess.TimeoutExpired:
        return None, f"not finished after {seconds:.0f} s"
    finally:
        _end(started)


def _end(started: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(started.pid, signal.SIGKILL)
    started.communicate()
