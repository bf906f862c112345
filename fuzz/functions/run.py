"""Calls one function inside a rank, forward and backward, and says what came out, or how it was refused.

Knows process groups and how each family is called (`fuzz.functions.called`); what must come out it does not know.
Nothing is bent here but what `fuzz.cpu_platform` bends: float64 stays float64 only where megatron-core leaves it so.
"""

import importlib
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from fuzz import drive
from fuzz.functions import inputs
from fuzz.functions.call import Call
from fuzz.functions.families import promise_of
from fuzz.refuse import refusal_of


@dataclass(frozen=True)
class Here:
    """The rank that calls: its number, megatron's groups, and the group of the call."""

    call: Call
    rank: int
    groups: ProcessGroupCollection
    group: Any

    def group_of(self, kind: str) -> Any:
        return drive.GROUPS[kind]()


def run(progress: Callable[[str], None], call: Call) -> dict[str, Any]:
    """Tensors and facts "out0", "out1", ... and "grad/<input>"; the fact "changed": inputs that were written to; or the
    fact "refusal".
    """
    progress(call.function)
    groups = drive.use_groups(call.layout)
    here = Here(call, dist.get_rank(), groups, drive.GROUPS[call.group]())
    family, _, name = call.function.partition(".")
    function = getattr(importlib.import_module(f"fuzz.functions.called.{family}"), name)
    promise = promise_of(call.function)
    given = {name: tensor.detach() for name, tensor in promise.inputs(call, here.rank).items()}
    given = {name: tensor.to(torch.cuda.current_device()) for name, tensor in given.items()}
    before = {name: tensor.clone() for name, tensor in given.items()}
    try:
        seen = _seen(here, function, given, promise.gradients)
    except Exception as error:
        if not any("megatron/core/" in frame.filename for frame in traceback.extract_tb(error.__traceback__)):
            raise  # ours
        return {"facts": {"refusal": refusal_of(error, call.function, 0)}}
    changed = [name for name, tensor in given.items() if not torch.equal(tensor.detach(), before[name])]
    tensors = {key: value for key, value in seen.items() if torch.is_tensor(value)}
    facts = {key: value for key, value in seen.items() if not torch.is_tensor(value)}
    return {"tensors": tensors, "facts": {**facts, "changed": changed + facts.pop("upstream changed", [])}}


def _seen(here: Here, function: Callable, given: dict[str, torch.Tensor], gradients: bool) -> dict[str, Any]:
    if gradients:
        for tensor in given.values():
            tensor.requires_grad_(tensor.is_floating_point())
    returned = function(here, **given)
    outputs = list(returned) if isinstance(returned, tuple) else [returned]
    # Before the backward pass, which writes to what was saved for it.
    seen = {f"out{i}": _copy(x) if torch.is_tensor(x) else x for i, x in enumerate(outputs)}
    tracked = {f"out{i}": x for i, x in enumerate(outputs) if torch.is_tensor(x) and x.requires_grad}
    if gradients and tracked:
        seen |= _backward(here, given, tracked)
    return seen


def _backward(here: Here, given: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    upstream = {name: inputs.upstream(here.call, here.rank, name, x).to(x.device) for name, x in outputs.items()}
    before = {name: gradient.clone() for name, gradient in upstream.items()}
    torch.autograd.backward(list(outputs.values()), list(upstream.values()))
    seen = {
        f"grad/{name}": _copy(x.grad) if x.grad is not None else None for name, x in given.items() if x.requires_grad
    }
    changed = [f"upstream/{name}" for name, gradient in upstream.items() if not torch.equal(gradient, before[name])]
    return {**seen, "upstream changed": changed}


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)
