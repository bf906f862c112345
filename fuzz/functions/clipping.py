"""What clip_grads and the local multi-tensor functions of utils promise: norms, scaling, counts. No megatron-core.

`rows` of a call count the gradients that a rank holds, which may be none.
"""

import math

import torch

from fuzz.functions import inputs
from fuzz.functions.call import Call
from fuzz.functions.promise import Inputs, Promise, Seen, each

NORMS = (2, 1, 3, math.inf, 2.0, "inf")
LENGTHS = (1, 3, 6, 0)


def gradients(call: Call, rank: int) -> Inputs:
    """g0, g1, ...: matrices [length, 2], the last of which may be empty; about half the elements are zero."""
    length = call["length"]
    made = {}
    for i in range(call.rows[rank]):
        short = call["empty"] and i == call.rows[rank] - 1
        shape = 0 if short else length, 2
        numbers = inputs.tensor(call, rank, f"g{i}", shape) * inputs.tensor(call, rank, f"kept{i}", shape, "bool")
        made[f"g{i}"] = inputs.laid(call, numbers)
    return made


def _norm(call: Call, given: list[Inputs]) -> list[Seen]:
    """(Σ|g|^p)^(1/p) over all elements on all ranks of the group; the greatest for infinity; 0 of nothing."""

    def of(rank: int) -> Seen:
        numbers = [abs(n) for m in call.members(rank) for g in given[m].values() for n in g.double().flatten().tolist()]
        kind = float(call["norm_type"])
        if math.isinf(kind):
            return {"out0": max(numbers, default=0.0)}
        return {"out0": math.fsum(n**kind for n in numbers) ** (1 / kind)}

    return each(call, of)


def _clipped(call: Call, given: list[Inputs]) -> list[Seen]:
    """Each gradient times max_norm / (total_norm + 1e-6), where that is below 1; the others as they are."""
    factor = call["max_norm"] / (call["total_norm"] + 1e-6)

    def of(rank: int) -> Seen:
        scaled = [g * factor if factor < 1 else g for g in given[rank].values()]
        return {f"out{i}": (g.double() if factor >= 1 else s.double()).to(g.dtype) for i, (g, s) in
                enumerate(zip(given[rank].values(), scaled, strict=True))}  # fmt: skip

    return each(call, of)


def kinds(call: Call, rank: int) -> list[str]:
    """Of each parameter: sharded over TP, a replica, shared (tied to another that counts), or without gradient."""
    of = ("sharded", "replica", "shared", "none")
    numbers = inputs.integers(call, inputs.ALL, "kinds", (max(call.rows),), 0, len(of) - 1).tolist()
    return [of[n] if call["mixed"] else "sharded" for n in numbers[: call.rows[rank]]]


def _zeros(call: Call, given: list[Inputs]) -> list[Seen]:
    """Zeros of all gradients of the group that count: not of shared parameters, of replicas on TP rank 0 alone."""

    def counted(rank: int) -> int:
        numbers = 0
        for kind, gradient in zip(kinds(call, rank), given[rank].values(), strict=True):
            counts = kind == "sharded" or (kind == "replica" and call.place(rank, "tp") == 0)
            numbers += sum(n == 0 for n in gradient.flatten().tolist()) if counts else 0
        return numbers

    return each(call, lambda rank: {"out0": float(sum(map(counted, call.members(rank))))})


def _duplicates(call: Call, given: list[Inputs]) -> list[Seen]:
    def of(rank: int) -> Seen:
        found = [kind == "sharded" or call.place(rank, "tp") == 0 for kind in kinds(call, rank)]
        shared = [kind != "shared" for kind in kinds(call, rank)]
        return {"out0": found, "out1": shared}

    return each(call, of)


def _l2(call: Call, given: list[Inputs]) -> list[Seen]:
    def of(rank: int) -> Seen:
        numbers = [n for g in given[rank].values() for n in g.double().flatten().tolist()]
        return {"out0": torch.tensor([math.fsum(n * n for n in numbers) ** 0.5], dtype=torch.float32), "out1": None}

    return each(call, of)


def _times(call: Call, given: list[Inputs]) -> list[Seen]:
    """What is asked for, in the dtype of what it is written to; the source stays as it is."""

    def of(rank: int) -> Seen:
        found = [(g.double() * call["scale"]).to(g.dtype) for g in given[rank].values()]
        return {f"out{i}": g for i, g in enumerate(found)}

    return each(call, of)


HELD = {"length": LENGTHS, "empty": (False, True)}
ROWS = (1, 2, 3, 0)
PROMISES = {
    "get_grad_norm_fp32": Promise(
        inputs=gradients,
        truth=_norm,
        arguments={**HELD, "norm_type": NORMS, "single": (False, True)},
        dtypes=("float32", "bfloat16"),
        rows=ROWS,
        uneven=True,
        gradients=False,
        rounding=8.0,
    ),
    "clip_grad_by_total_norm_fp32": Promise(
        inputs=gradients,
        truth=_clipped,
        arguments={
            **HELD, "max_norm": (1.0, 0.5, 10.0, 0.0, 1), "total_norm": (1.0, 4.0, 0.0, 0.25, math.inf),
            "decoupled": (False, True), "single": (False, True),
        },
        dtypes=("float32",),
        rows=ROWS,
        groups=("tp",),
        uneven=True,
        gradients=False,
        rounding=2.0,
    ),
    "count_zeros_fp32": Promise(
        inputs=gradients,
        truth=_zeros,
        arguments={**HELD, "mixed": (False, True), "decoupled": (False, True)},
        dtypes=("float32", "bfloat16"),
        rows=ROWS,
        uneven=True,
        gradients=False,
    ),
    "param_is_not_tensor_parallel_duplicate": Promise(
        inputs=gradients,
        truth=_duplicates,
        arguments={**HELD, "mixed": (True,), "given": (False, True)},
        dtypes=("float32",),
        groups=("tp",),
        rows=(2, 4),
        gradients=False,
    ),
    "local_multi_tensor_l2_norm": Promise(
        inputs=gradients, truth=_l2, arguments=HELD, rows=ROWS, groups=("tp",), gradients=False, rounding=8.0
    ),
    "local_multi_tensor_scale": Promise(
        inputs=gradients,
        truth=_times,
        arguments={**HELD, "scale": (1.0, 0.5, 0.3, 0.0)},
        rows=ROWS,
        groups=("tp",),
        gradients=False,
        rounding=2.0,
    ),
}  # fmt: skip
