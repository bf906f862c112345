"""Functions that the tests of the pool call inside ranks, by name. Knows torch.distributed, nothing of ours."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

Progress = Callable[[str], None]


def start(rank: int, world: int, store_path: str, plants: tuple[str, ...]) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store_path, world), rank=rank, world_size=world)


def start_fails_on_1(rank: int, world: int, store_path: str, plants: tuple[str, ...]) -> None:
    if rank == 1:
        raise ValueError(f"cannot start with plants={plants}")
    start(rank, world, store_path, plants)


def start_dies(rank: int, world: int, store_path: str, plants: tuple[str, ...]) -> None:
    print("about to leave")
    os._exit(7)


def whoami(progress: Progress) -> dict[str, Any]:
    return {"numbers": {"pid": os.getpid(), "parent": os.getppid(), "threads": torch.get_num_threads()}}


def total(progress: Progress, value: float) -> dict[str, Any]:
    progress("sum")
    number = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(number)
    return {"tensors": {"sum": number}, "numbers": {"rank": dist.get_rank()}, "facts": {"said": "ok"}}


def many_kinds(progress: Progress) -> dict[str, Any]:
    rank = dist.get_rank()
    tensors = {
        "bool": torch.tensor([True, False, True]),
        "int64": torch.arange(5) + rank,
        "float64": torch.full((2, 3), 0.5, dtype=torch.float64, requires_grad=True),
        "bfloat16": torch.ones(3, dtype=torch.bfloat16),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(7.0),
        "strided": torch.arange(6).reshape(2, 3).t(),
    }
    return {"tensors": tensors, "seconds": {"all": 0.25}}


def environment(progress: Progress, name: str) -> dict[str, Any]:
    return {"facts": {"value": os.environ.get(name, "")}}


def imported(progress: Progress, *names: str) -> dict[str, Any]:
    return {"facts": {name: name in sys.modules for name in names}}


def kills_its_parent(progress: Progress) -> dict[str, Any]:
    if dist.get_rank() == 0:
        os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(3600)
    return {}


def raises_on(progress: Progress, *ranks: int) -> dict[str, Any]:
    progress("before the sum")
    if dist.get_rank() in ranks:
        raise RuntimeError(f"refused on purpose by rank {dist.get_rank()}")
    return total(progress, 1.0)


def signals_itself(progress: Progress, name: str) -> dict[str, Any]:
    progress("before the end")
    print("last words")
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.Signals[name])
    return total(progress, 1.0)


def reads_null(progress: Progress) -> dict[str, Any]:
    if dist.get_rank() == 1:
        ctypes.string_at(0)
    return total(progress, 1.0)


def loops_on_1(progress: Progress) -> dict[str, Any]:
    progress("loop")
    while dist.get_rank() == 1:
        pass
    return {}


def misses_the_sum(progress: Progress) -> dict[str, Any]:
    progress("left out" if dist.get_rank() == 1 else "waiting")
    return {} if dist.get_rank() == 1 else total(progress, 1.0)


def holds_the_interpreter(progress: Progress) -> dict[str, Any]:
    """Sleeps an hour in C without letting any other Python thread run."""
    ctypes.PyDLL(None).sleep(3600)
    return {}


def sleeps(progress: Progress) -> dict[str, Any]:
    time.sleep(3600)
    return {}


def forks_and_waits(progress: Progress) -> dict[str, Any]:
    if os.fork() == 0:
        time.sleep(3600)
    time.sleep(3600)
    return {}


def bulk(progress: Progress, mebibytes: int) -> dict[str, Any]:
    return {"tensors": {"bulk": torch.zeros(mebibytes * 2**20, dtype=torch.uint8)}}


def not_a_dict(progress: Progress) -> dict[str, Any]:
    return {"tensor": torch.zeros(1)}
