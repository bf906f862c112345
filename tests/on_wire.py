"""Functions that the tests of `fuzz.group` call inside ranks: the same collectives on Gloo and on the wire."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fuzz import group, messages

Tensors = dict[str, torch.Tensor]
groups: dict[str, list[Any]] = {}


def start(rank: int, world: int, store_path: str, plants: tuple[str, ...]) -> None:
    """Both backends: of each the whole world, and the even and the odd ranks."""
    group.connect(rank, world, Path(store_path).parent)
    dist.init_process_group("gloo", store=dist.FileStore(store_path, world), rank=rank, world_size=world)
    for backend in ("gloo", group.BACKEND):
        members = [list(range(world)), list(range(rank % 2, world, 2))]
        made = [dist.new_group(members[0], backend=backend)]
        halves = [dist.new_group(list(range(k, world, 2)), backend=backend) for k in (0, 1)]
        groups[backend] = [*made, halves[rank % 2]]


def collectives(progress: Callable[[str], None], backend: str, dtype: str, which: int) -> dict[str, Any]:
    """The results of every collective that both have, on tensors of whole numbers, which any order sums alike."""
    kind, over = getattr(torch, dtype), groups[backend][which]
    size, me = over.size(), over.rank()
    own = (torch.arange(12) % 5 + me).to(kind).reshape(4, 3)
    found: Tensors = {}
    for name, op in (("sum", dist.ReduceOp.SUM), ("max", dist.ReduceOp.MAX), ("min", dist.ReduceOp.MIN)):
        found[name] = own.clone()
        dist.all_reduce(found[name], op=op, group=over)
    found["broadcast"] = own.clone()
    dist.broadcast(found["broadcast"], dist.get_global_rank(over, size - 1), group=over)
    parts = [torch.zeros(4, 3, dtype=kind) for _ in range(size)]
    dist.all_gather(parts, own.t().contiguous().t(), group=over)  # a tensor that is not contiguous
    found["gathered"] = torch.stack(parts)
    found["flat"] = torch.zeros(4 * size, 3, dtype=kind)
    dist.all_gather_into_tensor(found["flat"], own, group=over)
    rows = [i + 1 + me for i in range(size)]
    taken = [me + 1 + i for i in range(size)]
    found["uneven"] = torch.zeros(sum(taken), 3, dtype=kind)
    sent = torch.full((sum(rows), 3), me).to(kind)
    dist.all_to_all_single(found["uneven"], sent, taken, rows, group=over)
    found["message"] = _round(own, over)
    dist.barrier(group=over)
    objects: list[Any] = [None] * size
    dist.all_gather_object(objects, {"rank": me}, group=over)
    return {"tensors": found, "facts": {"objects": objects}}


def _round(own: torch.Tensor, over: Any) -> torch.Tensor:
    """Two messages to the next rank, asked for in order and waited for the other way round."""
    first, second = torch.zeros_like(own), torch.zeros_like(own)
    after, before = (dist.get_global_rank(over, (over.rank() + step) % over.size()) for step in (1, -1))
    if after == dist.get_rank():
        return own
    works = [dist.isend(own, after, group=over), dist.isend(own + 1, after, group=over)]
    works += [dist.irecv(first, before, group=over), dist.irecv(second, before, group=over)]
    for work in reversed(works):
        work.wait()
    return torch.cat([first, second])


def lacking_in_gloo(progress: Callable[[str], None]) -> dict[str, Any]:
    """What megatron-core needs and Gloo has not: means, uneven gathers and scatters."""
    over = groups[group.BACKEND][0]
    size, me = over.size(), over.rank()
    mean = torch.tensor([float(me), 1.0])
    dist.all_reduce(mean, op=dist.ReduceOp.AVG, group=over)
    parts = [torch.zeros(i + 1) for i in range(size)]
    dist.all_gather(parts, torch.full((me + 1,), float(me)), group=over)
    output = torch.zeros(me + 1)
    dist.reduce_scatter(output, [torch.full((i + 1,), float(me + 1)) for i in range(size)], group=over)
    return {"tensors": {"mean": mean, "gathered": torch.cat(parts), "scattered": output}}


def large(progress: Callable[[str], None], numbers: int) -> dict[str, Any]:
    """All send each other more than a socket has room for, at once, and then a little more."""
    over = groups[group.BACKEND][0]
    whole = torch.full((over.size(), numbers), over.rank(), dtype=torch.float64)
    taken = torch.empty_like(whole)
    dist.all_to_all_single(taken, whole, group=over)
    little = torch.tensor([1.0])
    dist.all_reduce(little, group=over)
    return {"numbers": {"wrong": sum(int((row != i).sum()) for i, row in enumerate(taken)), "little": float(little)}}


def two_channels(progress: Callable[[str], None]) -> dict[str, Any]:
    """Rank 0 sends on two groups, rank 1 takes in the other order."""
    first, second = groups[group.BACKEND][0], dist.new_group([0, 1], backend=group.BACKEND)
    got = [torch.zeros(1), torch.zeros(1)]
    if dist.get_rank() == 0:
        dist.send(torch.tensor([1.0]), 1, group=first)
        dist.send(torch.tensor([2.0]), 1, group=second)
    if dist.get_rank() == 1:
        dist.recv(got[1], 0, group=second)
        dist.recv(got[0], 0, group=first)
    return {"tensors": {"got": torch.cat(got)}}


def unequal(progress: Callable[[str], None]) -> dict[str, Any]:
    """Rank 0 reduces one number more than the others."""
    dist.all_reduce(torch.zeros(3 + (dist.get_rank() == 0)), group=groups[group.BACKEND][0])
    return {}


def leaves(progress: Callable[[str], None]) -> dict[str, Any]:
    """Rank 0 dies, the others wait for it."""
    if dist.get_rank() == 0:
        raise SystemExit
    dist.barrier(group=groups[group.BACKEND][0])
    return {}


def touched(progress: Callable[[str], None], how: str) -> dict[str, Any]:
    """Rank 0 changes or frees a tensor while it is sent, or waits first."""
    messages.settled()
    tensor, over = torch.ones(4), groups[group.BACKEND][0]
    if dist.get_rank() == 1:
        dist.recv(tensor, 0, group=over)
    if dist.get_rank() == 0:
        work = dist.isend(tensor, 1, group=over)
        if how == "waited for":
            work.wait()
        if how == "freed":
            tensor.data = torch.empty(1)
        else:
            tensor.add_(1)
    return {"facts": messages.settled()}


def asynchronous(progress: Callable[[str], None]) -> dict[str, Any]:
    """What is asked for asynchronously, read before and after it is waited for, as megatron's DDP asks for it."""
    over = groups[group.BACKEND][0]
    size, me = over.size(), over.rank()
    summed, gathered, scattered = torch.ones(3), torch.zeros(size), torch.zeros(2)
    with dist._coalescing_manager(over, async_ops=True) as sums:
        dist.all_reduce(summed, group=over, async_op=True)
    with dist._coalescing_manager(over, async_ops=True) as shares:
        dist.reduce_scatter_tensor(scattered, torch.arange(2.0 * size), group=over, async_op=True)
    works = [dist.all_gather_into_tensor(gathered, torch.tensor([1.0 + me]), group=over, async_op=True), sums, shares]
    found = summed, gathered, scattered
    early = torch.cat(found)
    for work in works:
        work.wait()
    return {"tensors": {"early": early, "late": torch.cat(found)}}
