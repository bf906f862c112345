"""What a token dispatcher promises: every routed copy arrives once where its expert is, and comes back once.

Both dispatchers are run as a layer runs them, with experts e(x, p) = p·x/ETP in between. Knows no megatron-core.
"""

import torch
from torch import Tensor

from fuzz.functions import inputs
from fuzz.functions.call import Call
from fuzz.functions.promise import Inputs, Promise, Seen, each, with_arguments

SHAPE = {"local": (1, 2, 3), "topk": (1, 2, 4), "hidden": (1, 3), "dropped": (False, True)}


def experts(call: Call) -> int:
    """All experts: `local` on each rank of an EP group."""
    return int(call["local"] * call.layout.ep)


def ordered(rows: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """The copies of one expert in an order of their own: in which they arrive nobody promises."""
    pairs = sorted((*row.tolist(), float(p)) for row, p in zip(rows, probs, strict=True))
    found = torch.tensor(pairs, dtype=rows.dtype).reshape(len(pairs), rows.shape[1] + 1)
    return found[:, :-1], found[:, -1]


def _given(call: Call, rank: int) -> Inputs:
    tokens, number = call.rows[rank], experts(call)
    chosen = inputs.routing(call, rank, "map", tokens, number, min(call["topk"], number))
    if call["dropped"]:
        chosen = inputs.laid(call, chosen & inputs.routing(call, rank, "kept", tokens, number, (number + 1) // 2))
    probs = inputs.positive(call, rank, "probs", (tokens, number))
    return {"tokens": inputs.tensor(call, rank, "tokens", (tokens, call["hidden"])), "probs": probs, "chosen": chosen}


def _arrived(call: Call, rank: int, given: list[Inputs]) -> Seen:
    """The copies for each expert of this rank, of all ranks that share experts with it."""
    first, sources = call.place(rank, "ep") * call["local"], call.members(rank, "etp-ep")
    rows, probs, counts = [], [], []
    for expert in range(first, first + call["local"]):
        routed = [(given[source], given[source]["chosen"][:, expert]) for source in sources]
        some = torch.cat([found["tokens"].detach()[here] for found, here in routed])
        gates = torch.cat([found["probs"].detach()[here, expert] for found, here in routed])
        counts.append(len(some))
        some, gates = ordered(some, gates)
        rows.append(some)
        probs.append(gates)
    return {"out0": torch.cat(rows), "out1": torch.cat(probs), "out2": counts}


def _combined(call: Call, rank: int, given: Inputs) -> Seen:
    """Each token times the sum of its gates, and what comes back through that."""
    dtype, kept = inputs.dtype_of(call.dtype), given["chosen"].double()
    tokens, gates = given["tokens"].detach().double(), given["probs"].detach().double() * kept
    total = gates.sum(1, keepdim=True)
    combined = (tokens * total).to(dtype)
    upstream = inputs.upstream(call, rank, "out3", combined).double()
    back = {"grad/tokens": upstream * total, "grad/probs": (upstream * tokens).sum(1, keepdim=True) * kept}
    return {"out3": combined} | {name: gradient.to(dtype) for name, gradient in back.items()}


def _truth(call: Call, given: list[Inputs]) -> list[Seen]:
    return each(call, lambda rank: _arrived(call, rank, given) | _combined(call, rank, given[rank]))


def _fits(call: Call) -> Call:
    return with_arguments(call, topk=min(call["topk"], experts(call)))


_ROUND_TRIP = {"inputs": _given, "truth": _truth, "arguments": SHAPE, "dtypes": ("float64", "float32"), "fit": _fits}
PROMISES = {
    "alltoall": Promise(**_ROUND_TRIP, groups=("etp-ep",), uneven=True, rounding=8.0),  # type: ignore[arg-type]
    # Which takes as many tokens on every rank for granted.
    "allgather": Promise(**_ROUND_TRIP, groups=("etp-ep",), rounding=8.0),  # type: ignore[arg-type]
}
