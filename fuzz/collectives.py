"""What the functions of torch.distributed move: how many elements to and from whom, from the arguments of a call.

Knows torch's names for those arguments. Knows nothing of records, groups made elsewhere or other ranks.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class Moved(NamedTuple):
    """Elements to and from each member of the group, the tensor that is named, and what else must agree."""

    sent: Sequence[int]
    taken: Sequence[int]
    tensor: torch.Tensor | None = None
    detail: str = ""


Named = dict[str, Any]  # the arguments of a call under torch's own names
Describe = Callable[[Named, int, int], Moved]  # of the arguments, the size of the group, this rank's place in it


def _only(number: int, place: int, size: int) -> list[int]:
    return [number if member == place else 0 for member in range(size)]


def _numbers(tensors: Sequence[torch.Tensor] | None, size: int) -> list[int]:
    return [tensor.numel() for tensor in tensors] if tensors else [0] * size


def _split(tensor: torch.Tensor, rows: Sequence[int] | None, size: int) -> list[int]:
    """Elements per member of a tensor cut along its first axis; in equal parts where `rows` is None."""
    if rows is None or not len(rows):
        return [tensor.numel() // size] * size
    return [int(number) * (tensor.numel() // max(tensor.shape[0], 1)) for number in rows]


def _reduction(op: Any) -> str:
    return str(op).rpartition(".")[2].lower()


def _root(named: Named, end: str) -> int:
    """The place in the group of the rank that `src` or `dst` names."""
    if named.get(f"group_{end}") is not None:
        return int(named[f"group_{end}"])
    return dist.get_group_rank(named["group"] or dist.group.WORLD, named[end] or 0)  # type: ignore[arg-type]


def _all_reduce(a: Named, size: int, me: int) -> Moved:
    each = [a["tensor"].numel()] * size
    return Moved(each, each, a["tensor"], _reduction(a["op"]))


def _reduce(a: Named, size: int, me: int) -> Moved:
    root, number = _root(a, "dst"), a["tensor"].numel()
    taken = [number if me == root else 0] * size
    return Moved(_only(number, root, size), taken, a["tensor"], f"{_reduction(a['op'])} to {root}")


def _broadcast(a: Named, size: int, me: int) -> Moved:
    root, number = _root(a, "src"), a["tensor"].numel()
    return Moved([number if me == root else 0] * size, _only(number, root, size), a["tensor"], f"from {root}")


def _all_gather(a: Named, size: int, me: int) -> Moved:
    return Moved([a["tensor"].numel()] * size, _numbers(a["tensor_list"], size), a["tensor"])


def _all_gather_into_tensor(a: Named, size: int, me: int) -> Moved:
    sent = [a["input_tensor"].numel()] * size
    return Moved(sent, [a["output_tensor"].numel() // size] * size, a["input_tensor"])


def _reduce_scatter(a: Named, size: int, me: int) -> Moved:
    taken = [a["output"].numel()] * size
    return Moved(_numbers(a["input_list"], size), taken, a["output"], _reduction(a["op"]))


def _reduce_scatter_tensor(a: Named, size: int, me: int) -> Moved:
    sent = [a["input"].numel() // size] * size
    return Moved(sent, [a["output"].numel()] * size, a["output"], _reduction(a["op"]))


def _all_to_all_single(a: Named, size: int, me: int) -> Moved:
    sent = _split(a["input"], a["input_split_sizes"], size)
    return Moved(sent, _split(a["output"], a["output_split_sizes"], size), a["input"])


def _all_to_all(a: Named, size: int, me: int) -> Moved:
    sent, taken = a["input_tensor_list"], a["output_tensor_list"]
    return Moved(_numbers(sent, size), _numbers(taken, size), sent[0])


def _gather(a: Named, size: int, me: int) -> Moved:
    root = _root(a, "dst")
    return Moved(_only(a["tensor"].numel(), root, size), _numbers(a["gather_list"], size), a["tensor"], f"to {root}")


def _scatter(a: Named, size: int, me: int) -> Moved:
    root = _root(a, "src")
    return Moved(_numbers(a["scatter_list"], size), _only(a["tensor"].numel(), root, size), a["tensor"], f"from {root}")


def _barrier(a: Named, size: int, me: int) -> Moved:
    return Moved([0] * size, [0] * size)


def _new_group(a: Named, size: int, me: int) -> Moved:
    return Moved([0] * size, [0] * size, None, "all" if a["ranks"] is None else str(sorted(a["ranks"])))


def _send(a: Named, size: int, me: int) -> Moved:
    return Moved([a["tensor"].numel()], [], a["tensor"], str(a["tag"]))


def _recv(a: Named, size: int, me: int) -> Moved:
    return Moved([], [a["tensor"].numel()], a["tensor"], str(a["tag"]))


DESCRIBED: dict[str, Describe] = {
    "all_reduce": _all_reduce,
    "reduce": _reduce,
    "broadcast": _broadcast,
    "all_gather": _all_gather,
    "all_gather_into_tensor": _all_gather_into_tensor,
    "_all_gather_base": _all_gather_into_tensor,
    "reduce_scatter": _reduce_scatter,
    "reduce_scatter_tensor": _reduce_scatter_tensor,
    "_reduce_scatter_base": _reduce_scatter_tensor,
    "all_to_all_single": _all_to_all_single,
    "all_to_all": _all_to_all,
    "gather": _gather,
    "scatter": _scatter,
    "barrier": _barrier,
    "new_group": _new_group,
    "send": _send,
    "isend": _send,
    "recv": _recv,
    "irecv": _recv,
}
