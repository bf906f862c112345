"""What a collective costs on Gloo and on the wire: `python benchmarks/wire.py [--ranks 2,4,8] [--times 400]`.

Milliseconds per call, all ranks of the world calling it in a row; 32 bytes each.
"""

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from asked import one_or_more, some_of
from rich.console import Console
from rich.table import Table

from fuzz import group

OPS = ("all_to_all_single", "all_reduce", "broadcast")


def _called(op: str, tensor: torch.Tensor, into: torch.Tensor) -> None:
    if op == "all_to_all_single":
        dist.all_to_all_single(into, tensor)
    elif op == "all_reduce":
        dist.all_reduce(into)
    else:
        dist.broadcast(into, 0)


def _in_rank(rank: int, world: int, folder: str, backend: str, times: int, answer: "multiprocessing.Queue") -> None:
    torch.set_num_threads(1)
    if backend == group.BACKEND:
        group.connect(rank, world, Path(folder))
    dist.init_process_group(backend, store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    tensor, into = torch.ones(8), torch.ones(8)
    for op in OPS:
        dist.barrier()
        began = time.perf_counter()
        for _ in range(times):
            _called(op, tensor, into)
        dist.barrier()
        if rank == 0:
            answer.put((op, (time.perf_counter() - began) / times * 1e3))


def measured(backend: str, world: int, times: int) -> dict[str, float]:
    """Milliseconds by operation."""
    context = multiprocessing.get_context("fork")
    answer: multiprocessing.Queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = [(rank, world, folder, backend, times, answer) for rank in range(world)]
        processes = [context.Process(target=_in_rank, args=each, daemon=True) for each in arguments]
        for process in processes:
            process.start()
        found = dict(answer.get(timeout=120) for _ in OPS)
        for process in processes:
            process.join(30)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=some_of(range(2, 17)), default="2,4,8")
    parser.add_argument("--times", type=one_or_more, default=400)
    asked = parser.parse_args()
    table = Table("ranks", "operation", "Gloo ms", "wire ms", "ratio")
    for world in asked.ranks:
        gloo, wire = (measured(backend, world, asked.times) for backend in ("gloo", group.BACKEND))
        for op in OPS:
            table.add_row(str(world), op, f"{gloo[op]:.2f}", f"{wire[op]:.2f}", f"{gloo[op] / wire[op]:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
