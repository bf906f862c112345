"""Records every collective of this process: which, on which group, how many elements to and from whom, called where.

Runs inside a rank, on Gloo and on NCCL alike: it stands in front of torch.distributed's functions and changes nothing
that they do. What one of them calls in turn is not recorded again. Knows nothing of the other ranks.
"""

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType, FunctionType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from fuzz.lockstep import MESSAGES, Call, line
from fuzz.pulse import Pulse


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
SAME = {"_all_gather_base": "all_gather_into_tensor", "_reduce_scatter_base": "reduce_scatter_tensor"}
MADE_BY_ALL = ("new_group",)  # every rank of the world takes part, whatever group it names


# As torch has them: what the platform puts in their place takes the same arguments.
SIGNATURES = {name: inspect.signature(getattr(dist, name)) for name in DESCRIBED}


# ---- in front of torch.distributed -----------------------------------------------------------------------------


def apply(pulse: Pulse) -> None:
    """Record from now on into `pulse`; once per process, after everything else that replaces collectives."""
    nested = threading.local()
    fronts = {getattr(dist, name): _front(name, getattr(dist, name), pulse, nested) for name in DESCRIBED}
    for module in (dist, distributed_c10d, *_users()):
        functions = {name: value for name, value in vars(module).items() if isinstance(value, FunctionType)}
        for name in [name for name, value in functions.items() if value in fronts]:
            setattr(module, name, fronts[functions[name]])


def _users() -> list[Any]:
    """Modules that may have taken a collective by value."""
    return [module for name, module in sys.modules.items() if name.startswith(("megatron.", "toy_models."))]


def _front(name: str, function: Callable, pulse: Pulse, nested: threading.local) -> Callable:
    @functools.wraps(function)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        call = None if getattr(nested, "inside", False) else _described(name, args, kwargs)
        if call is None:
            return function(*args, **kwargs)
        index = pulse.issue(line(call))
        nested.inside = True
        pulse.enter(index)
        try:
            work = function(*args, **kwargs)
        finally:
            nested.inside = False
        pulse.leave()  # not where it raised: it then stays known for whom the rank waited
        return _Pending(work, pulse, index) if hasattr(work, "wait") else work

    return recorded


class _Pending:
    """What an asynchronous collective returned; waiting for it is being inside it."""

    def __init__(self, work: Any, pulse: Pulse, index: int) -> None:
        self._work, self._pulse, self._index = work, pulse, index

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        self._pulse.enter(self._index)
        answer = self._work.wait(*args, **kwargs)
        self._pulse.leave()
        return answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _described(name: str, args: tuple, kwargs: Named) -> Call | None:
    """The call as a value; None where this rank is no member, or alone."""
    bound = SIGNATURES[name].bind(*args, **kwargs)
    bound.apply_defaults()
    named = bound.arguments
    group = None if name in MADE_BY_ALL else named["group"]
    me, size = dist.get_rank(group), dist.get_world_size(group)
    if me < 0 or size == 1:
        return None
    moved = DESCRIBED[name](named, size, me)
    return Call(
        op=SAME.get(name, name),
        group=_name(group),
        ranks=tuple(dist.get_process_group_ranks(group)) if name not in MESSAGES else _ends(name, named),
        sent=tuple(moved.sent),
        taken=tuple(moved.taken),
        shape=() if moved.tensor is None else tuple(moved.tensor.shape),
        dtype="" if moved.tensor is None else str(moved.tensor.dtype)[6:],
        detail=moved.detail,
        where=_where(sys._getframe(2)),
    )


def _name(group: Any) -> str:
    """The same on all ranks: groups are made in the same order everywhere."""
    group = group or dist.group.WORLD
    said = getattr(group, "group_desc", "")
    return f"{group.group_name} {said}" if said not in ("", "undefined", "default_pg") else str(group.group_name)


def _ends(name: str, named: Named) -> tuple[int, int]:
    """The ranks from and to which a message goes."""
    end = "dst" if MESSAGES[name] == "send" else "src"
    group: Any = named["group"] or dist.group.WORLD
    peer = dist.get_global_rank(group, named[f"group_{end}"]) if named[f"group_{end}"] is not None else named[end]
    return (dist.get_rank(), peer) if end == "dst" else (peer, dist.get_rank())


MAPPINGS = "tensor_parallel/mappings.py"  # where most collectives are called, on behalf of somebody else


def _where(frame: FrameType | None) -> str:
    """The place in megatron-core or in the trainer, and the mapping in between."""
    inner = ""
    while frame is not None:
        file = _place(frame.f_code.co_filename)
        if file == MAPPINGS:
            inner = inner or f", in {frame.f_code.co_name} of mappings.py:{frame.f_lineno}"
        elif file:
            return f"{file}:{frame.f_lineno}{inner}"
        frame = frame.f_back
    return inner.removeprefix(", in ") or "no known place"


@functools.lru_cache(maxsize=4096)
def _place(filename: str) -> str:
    """The file below megatron/core, or in the trainer or wherever else; '' for torch and the harness."""
    for root in ("megatron/core/", "toy_models/", "tests/"):
        _, found, below = filename.rpartition(root)
        if found:
            return below if root == "megatron/core/" else found + below
    return ""
