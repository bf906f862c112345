"""Functions that the tests of the pool call inside ranks, by name. Knows torch.distributed and the recorder."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from fuzz import pulse, recorder

Progress = Callable[[str], None]


def start(rank: int, world: int, store_path: str, plants: tuple[str, ...]) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store_path, world), rank=rank, world_size=world)


def start_recorded(rank: int, world: int, store_path: str, plants: tuple[str, ...]) -> None:
    start(rank, world, store_path, plants)
    assert pulse.own is not None
    recorder.apply(pulse.own)


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


def no_more_threads(progress: Progress) -> dict[str, Any]:
    """What the system says where a thread cannot be made."""
    raise RuntimeError("Resource temporarily unavailable")


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


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


def out_of_step(progress: Progress, how: str) -> dict[str, Any]:
    """Calls that cannot match, one kind each; rank 1 is the odd one."""
    progress("before")
    total(progress, 1.0)
    OUT_OF_STEP[how](dist.get_rank() == 1)
    return {}


def _pairs() -> tuple[Any, Any]:
    return dist.new_group([0, 1], group_desc="first"), dist.new_group([0, 1], group_desc="second")


def _crossed(odd: bool) -> None:
    for group in _pairs()[:: -1 if odd else 1]:
        dist.barrier(group)


def _messages(odd: bool) -> None:
    dist.recv(ones(2), 1 - dist.get_rank())


def _pending(odd: bool) -> None:
    if not odd:
        dist.broadcast(ones(2), src=1, async_op=True).wait()


def _coalesced(odd: bool) -> None:
    """The calls wait in the end of their manager, on another group than the odd rank's."""
    group, another = _pairs()
    if odd:
        return dist.barrier(another)
    with distributed_c10d._coalescing_manager(group):
        for _ in range(2):
            dist.all_reduce(ones(2), group=group)
    return None


def _unequal_splits(odd: bool) -> None:
    splits = [1, 2] if odd else [2, 1]
    dist.all_to_all_single(ones(3, 4), ones(3, 4), [2, 1], splits)


OUT_OF_STEP: dict[str, Callable[[bool], Any]] = {
    "operation": lambda odd: dist.all_gather([ones(2)] * 2, ones(2)) if odd else dist.broadcast(ones(2), 0),
    "shape": lambda odd: dist.all_reduce(ones(3 if odd else 2)),
    "type": lambda odd: dist.all_reduce(ones(2).double() if odd else ones(2)),
    "reduction": lambda odd: dist.all_reduce(ones(2), dist.ReduceOp.MAX if odd else dist.ReduceOp.SUM),
    "root": lambda odd: dist.broadcast(ones(2), int(odd)),
    "splits": _unequal_splits,
    "group": lambda odd: dist.barrier(_pairs()[odd]),
    "order": _crossed,
    "coalesced": _coalesced,
    "left out": lambda odd: None if odd else dist.all_reduce(ones(2)),
    "messages": _messages,
    "pending": _pending,
    "one more": lambda odd: None if odd else dist.broadcast(ones(2), 0, async_op=True),
}


def busy_for_ever(progress: Progress) -> dict[str, Any]:
    while True:
        total(progress, 1.0)


def loops_on_1(progress: Progress) -> dict[str, Any]:
    progress("loop")
    while dist.get_rank() == 1:
        pass
    return {}


def loops(progress: Progress) -> dict[str, Any]:
    while True:
        pass


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


def two_causes() -> None:
    """A bug to plant: experts raise, of one kind where there are more than two of them, else of another."""
    from megatron.core.transformer.moe.experts import SequentialMLP

    def forward(self: Any, *_: Any) -> Any:
        kind = ValueError if self.num_local_experts > 2 else KeyError
        raise kind(f"{self.num_local_experts} experts")

    SequentialMLP.forward = forward


def experts_sleep() -> None:
    """A bug to plant: experts sleep for an hour; a file that $FIRED names tells that they do."""
    from megatron.core.transformer.moe.experts import SequentialMLP

    def forward(self: Any, *_: Any) -> Any:
        Path(os.environ["FIRED"]).touch()
        time.sleep(3600)

    SequentialMLP.forward = forward
