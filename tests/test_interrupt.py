"""Ctrl-C in `pytest fuzz/`: in the middle of a case, and of shrinking. What was found is kept, and nothing is left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from fuzz.case_json import from_json
from tests.test_ranks_end import gone

ROOT = Path(__file__).parents[1]
PATIENCE = 90.0  # seconds until there is something to interrupt
ENDS = 20.0  # seconds that an interrupted run may take


@contextmanager
def fuzzing(tmp_path: Path, plant: str) -> Iterator[subprocess.Popen[str]]:
    """`pytest fuzz/` with a planted bug; what it says goes to the file `said`."""
    for file in ("conftest.py", "pyproject.toml", "fuzz"):
        (tmp_path / file).symlink_to(ROOT / file)
    command = [sys.executable, "-m", "pytest", "fuzz/", "--hypothesis-profile=ci", "--max-ranks=2", "--plant", plant]
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(
            [*command, "-k", "any_case and 2ranks", f"--rootdir={tmp_path}", "-p", "no:cacheprovider"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "FIRED": str(tmp_path / "fired")},
            stdout=said,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)


def interrupted(process: subprocess.Popen[str], tmp_path: Path, when: Callable[[], bool]) -> str:
    """What it said, after Ctrl-C on its terminal when something is seen; nothing of it is left."""
    until = time.monotonic() + PATIENCE
    while not when():
        assert process.poll() is None and time.monotonic() < until, (tmp_path / "said").read_text()
        time.sleep(0.05)
    below = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    assert len(below) > 2
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(ENDS) == 2
    assert gone(below, [])
    return (tmp_path / "said").read_text()


def test_in_the_middle_of_a_case(tmp_path: Path) -> None:
    with fuzzing(tmp_path, "tests.in_ranks:experts_sleep") as process:
        said = interrupted(process, tmp_path, (tmp_path / "fired").exists)
    assert "KeyboardInterrupt" in said and "new failures" not in said and "Falsifying" not in said


def test_in_the_middle_of_shrinking(tmp_path: Path) -> None:
    """The best so far lies in its folder and is printed, with the line to paste."""
    failures = tmp_path / ".fuzz" / "failures"
    with fuzzing(tmp_path, "toy_models.planted.gradients:expert_gradients_scaled_twice") as process:
        said = interrupted(process, tmp_path, lambda: any(failures.glob("*/case.json")))
    [folder] = failures.iterdir()
    case = from_json((folder / "case.json").read_text())
    assert case.layout.ep > 1 and {file.name for file in folder.iterdir()} >= {"case.json", "original.json"}
    assert f".fuzz/failures/{folder.name}\n@example({case!r})" in said and "interrupted" in said
