"""What a function promises, as a value: what it may be asked for, the tensors it is given, and what must come out.

Knows torch and calls; no megatron-core: what must come out is written from the documented definition, in plain loops.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from fuzz.functions import inputs
from fuzz.functions.call import Call

FLOATS = ("float64", "float32", "bfloat16")
MOVED = (*FLOATS, "int64", "bool")  # what is only moved may be anything
ADDED = (*FLOATS, "int64")
HERE = ("tp",)  # functions of one rank
COLS = {"cols": (1, 2, 4, 6)}
ANY_GROUP = (
    "tp", "ep", "pp", "cp", "dp", "dp-cp", "tp-cp", "tp-dp", "tp-dp-cp", "tp-pp", "etp", "etp-ep", "etp-ep-pp", "edp",
)  # fmt: skip

Inputs = Mapping[str, torch.Tensor]
Seen = dict[str, Any]  # "out", "out1", ...: what was returned; "grad/x": the gradient of input x


class Doubt(Exception):
    """A discrete choice lies within the noise of a tie: this call says nothing."""


class Refused(Exception):
    """What the function does not promise: it must refuse."""


def no_inputs(call: Call, rank: int) -> Inputs:
    return {}


@dataclass(frozen=True)
class Check:
    """Where several results are right: `wrong(seen)` says what is wrong with one, or ''."""

    wrong: Callable[[Any], str]


@dataclass(frozen=True, kw_only=True)
class Promise:
    """What a function may be asked for, and what must come out.

    `arguments`: the values of each, the simplest first. `inputs(call, rank)`: its tensors. `truth(call, inputs)`: per
    rank what must be seen, exactly where `rounding` is 0, else within so many units of the last place of the greatest
    element, or of `floor` where the result is the difference of greater numbers; `single`: of float32 at best, since
    megatron-core works in float32 there; `coarse`: of the call's dtype at best. `uneven`: ranks may hold different
    numbers of rows, else all hold as many as the first. `fit(call)` is the call with what goes together. `changes`
    names inputs that the documentation says are written to; `gradients`: whether it has any.
    """

    truth: Callable[[Call, list[Inputs]], list[Seen]]
    inputs: Callable[[Call, int], Inputs] = no_inputs
    arguments: Mapping[str, tuple] = field(default_factory=dict)
    dtypes: tuple[str, ...] = FLOATS
    groups: tuple[str, ...] = ANY_GROUP
    rows: tuple[int, ...] = (1, 2, 3, 4, 0)
    uneven: bool = False
    contiguous: tuple[bool, ...] = (True, False)
    rounding: float = 0.0
    floor: float = 0.0
    single: bool = False
    coarse: bool = False
    changes: tuple[str, ...] = ()
    gradients: bool = True
    fit: Callable[[Call], Call] = lambda call: call


def each(call: Call, of_rank: Callable[[int], Seen]) -> list[Seen]:
    """The truth of every rank."""
    return [of_rank(rank) for rank in range(call.world)]


def with_arguments(call: Call, **changes: Any) -> Call:
    """The call with other values of some arguments."""
    return replace(call, arguments=tuple({**dict(call.arguments), **changes}.items()))


def local(formula: Callable[..., Any]) -> Callable[[Call, list[Inputs]], list[Seen]]:
    """The truth of a function that each rank computes by itself: formula(call, rank, **inputs), and its gradient.

    The formula gets floats as float64 and returns pairs of a value and its dtype; what is no tensor stands alone.
    """
    return lambda call, given: [differentiated(call, r, given[r], partial(formula, call, r)) for r in range(call.world)]


def differentiated(call: Call, rank: int, given: Inputs, formula: Callable[..., Any]) -> Seen:
    """What a plain formula in float64 gives, and its gradient by autograd."""
    leaves = {n: x.double().clone().requires_grad_() if x.is_floating_point() else x for n, x in given.items()}
    returned = formula(**leaves)
    outputs = returned if isinstance(returned, list) else [returned]
    seen: Seen = {}
    tracked: list[torch.Tensor] = []
    upstream: list[torch.Tensor] = []
    for i, output in enumerate(outputs):
        value, dtype = output if isinstance(output, tuple) and torch.is_tensor(output[0]) else (output, None)
        seen[f"out{i}"] = value.detach().to(dtype) if torch.is_tensor(value) and dtype else value
        if torch.is_tensor(value) and value.requires_grad:
            tracked.append(value)
            upstream.append(inputs.upstream(call, rank, f"out{i}", seen[f"out{i}"]).double())
    if tracked:
        torch.autograd.backward(tracked, upstream)
        for name, x in leaves.items():
            if x.is_floating_point():
                grad = torch.zeros_like(x) if x.grad is None else x.grad
                seen[f"grad/{name}"] = grad.to(given[name].dtype)
    return seen
