"""Records every collective of this process: which, on which group, how many elements to and from whom, called where.

Runs inside a rank, on Gloo and on NCCL alike: it stands in front of torch.distributed's functions and changes nothing
that they do. What one of them calls in turn is not recorded again. Knows nothing of the other ranks.
"""

import contextlib
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType, FunctionType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from fuzz.collectives import DESCRIBED, Named
from fuzz.lockstep import MESSAGES, ON_DEVICE, Call, line
from fuzz.pulse import Pulse

SAME = {"_all_gather_base": "all_gather_into_tensor", "_reduce_scatter_base": "reduce_scatter_tensor"}
MADE_BY_ALL = ("new_group",)  # every rank of the world takes part, whatever group it names


# Names in order with their defaults, as torch has them: what the platform puts in their place takes the same arguments.
ARGUMENTS = {
    name: {argument.name: argument.default for argument in inspect.signature(getattr(dist, name)).parameters.values()}
    for name in DESCRIBED
}


# ---- in front of torch.distributed -----------------------------------------------------------------------------


def apply(pulse: Pulse) -> None:
    """Record from now on into `pulse`; once per process, after everything else that replaces collectives."""
    nested = threading.local()
    fronts = {getattr(dist, name): _front(name, getattr(dist, name), pulse, nested) for name in DESCRIBED}
    for module in (dist, distributed_c10d, *_users()):
        functions = {name: value for name, value in vars(module).items() if isinstance(value, FunctionType)}
        for name in [name for name, value in functions.items() if value in fronts]:
            setattr(module, name, fronts[functions[name]])
        if "_coalescing_manager" in functions:
            module._coalescing_manager = _at_its_end(functions["_coalescing_manager"], pulse, nested)
    if torch.cuda.is_available():
        for owner, name in WAITS:
            setattr(owner, name, _waiting(getattr(owner, name), pulse, nested))


# Collectives on a device return at once; these wait until it has done all that it was given.
WAITS: list[tuple[Any, str]] = [
    *((owner, "synchronize") for owner in (torch.cuda, torch.cuda.Event, torch.cuda.Stream)),
    *((torch.Tensor, name) for name in ("item", "tolist", "cpu", "nonzero", "__bool__", "__int__", "__float__")),
]


def _waiting(function: Callable, pulse: Pulse, nested: threading.local) -> Callable:
    @functools.wraps(function)
    def waited(*args: Any, **kwargs: Any) -> Any:
        if getattr(nested, "inside", False) or (args and getattr(args[0], "is_cuda", True) is False):
            return function(*args, **kwargs)
        pulse.enter(ON_DEVICE)
        answer = function(*args, **kwargs)
        pulse.leave()
        return answer

    return waited


def _at_its_end(manager: Callable, pulse: Pulse, nested: threading.local) -> Callable:
    """Calls that are put together are made when their manager ends: the rank is then inside the last of them."""

    @contextlib.contextmanager
    def coalesced(*args: Any, **kwargs: Any) -> Iterator[Any]:
        before = pulse.issued
        with manager(*args, **kwargs) as together:
            yield together
            if recorded := pulse.issued > before and not getattr(nested, "inside", False):
                pulse.enter(pulse.issued - 1)
        if recorded:
            pulse.leave()

    return coalesced


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
        return _Pending(work, pulse, index) if _can_be_waited_for(work) else work

    return recorded


def _can_be_waited_for(work: Any) -> bool:
    """Not what a coalescing manager gives for a call that it will make at its end."""
    return not isinstance(work, distributed_c10d._IllegalWork) and hasattr(work, "wait")


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
    named = {**ARGUMENTS[name], **dict(zip(ARGUMENTS[name], args, strict=False)), **kwargs}
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
