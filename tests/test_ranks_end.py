"""However a pool or its parent ends, no process, socket or file of theirs is left."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fuzz.ranks import Ranks

SELF = "tests.in_ranks"


def gone(pids: list[int], folders: list[Path], seconds: float = 8.0) -> bool:
    """Whether no process and no folder is left, within `seconds`."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(map(alive, pids)) and not any(folder.exists() for folder in folders):
            return True
        time.sleep(0.05)
    return False


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # also where it ends between the two looks
        return False


def test_helpers_that_a_rank_forks_die_with_it() -> None:
    ranks = Ranks(1, start=None, preload=("torch",), patience=0.5)
    pid = ranks.run(f"{SELF}:whoami")[0].numbers["pid"]
    children: list[int] = []
    original = ranks._pool.text

    def look(kind: str, rank: int) -> str:  # the last moment before the pool is killed
        children.extend(child.pid for child in psutil.Process(pid).children())
        return original(kind, rank)

    ranks._pool.text = look  # type: ignore[method-assign]
    assert ranks.run(f"{SELF}:forks_and_waits")[0].outcome == "hung"
    assert children and gone([pid, *children], [])


PARENT = """
import os, signal, sys
# A shell starts background jobs with SIGINT ignored, and Python keeps it so.
signal.signal(signal.SIGINT, signal.default_int_handler)
from multiprocessing import forkserver, resource_tracker, util
from fuzz import forking
from fuzz.ranks import Ranks
forking.PRELOAD = ("torch",)
ranks = Ranks(2, start="tests.in_ranks:start", preload=("torch",))
pids = [int(one.numbers["pid"]) for one in ranks.run("tests.in_ranks:whoami")]
others = [forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid]
print(*pids, *others, *(p.pid for p in __import__("multiprocessing").active_children()), flush=True)
print(forking.home(), util.get_temp_dir(), flush=True)
{then}
"""


def parent(then: str) -> tuple[subprocess.Popen, list[int], list[Path]]:
    """Another parent with a pool of its own, its processes and its folders."""
    root = Path(__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(then=then)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
    )
    pids = [int(word) for word in process.stdout.readline().split()]
    return process, pids, [Path(word) for word in process.stdout.readline().split()]


@pytest.mark.parametrize("function", ["sleeps", "holds_the_interpreter"])
def test_a_killed_parent_leaves_nothing(function: str) -> None:
    process, pids, folders = parent(f"ranks.run('{SELF}:{function}')")
    assert len(set(pids)) == 5 and all(map(alive, pids)) and all(folder.exists() for folder in folders)
    time.sleep(0.3)
    process.kill()
    process.wait(10)
    began = time.monotonic()
    assert gone(pids, folders)
    print(f"nothing left {time.monotonic() - began:.2f} s after SIGKILL of the parent")


def test_a_parent_that_ends_leaves_nothing() -> None:
    process, pids, folders = parent("")
    assert process.wait(10) == 0
    assert gone(pids, folders)


def test_an_interrupt_ends_the_case_and_leaves_nothing() -> None:
    process, pids, folders = parent(f"ranks.run('{SELF}:sleeps')")
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) in (1, 130, -signal.SIGINT)
    assert gone(pids, folders)


def test_a_closed_pool_leaves_nothing() -> None:
    ranks = Ranks(2, start=f"{SELF}:start", preload=("torch",))
    pids, folder = [one.numbers["pid"] for one in ranks.run(f"{SELF}:whoami")], ranks._pool.folder
    ranks.close()
    assert gone(pids, [folder])


def test_a_fork_server_killed_from_outside_is_a_fault_of_the_harness() -> None:
    process, pids, folders = parent(f"ranks.run('{SELF}:kills_its_parent')")
    assert "its fork server was killed from outside" in process.communicate(timeout=10)[1]
    assert gone(pids, folders)
