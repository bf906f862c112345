"""What tensor_parallel.mappings promises: what is moved or added, and the gradient that its docstrings name.

`rows` of a call count the first dimension of the smaller side, `cols` the last. Knows no megatron-core.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from fuzz.functions import inputs
from fuzz.functions.call import Call
from fuzz.functions.promise import ADDED, MOVED, Inputs, Promise, Seen, with_arguments

WIDE: Mapping[str, tuple] = {"cols": (1, 2, 3), "dims": (2, 3)}


def shape_of(call: Call, rows: int, cols: int) -> tuple[int, ...]:
    """[rows, cols], or [rows, 2, cols]."""
    return (rows, *(2,) * (call["dims"] - 2), cols)


def one(call: Call, rank: int, times_rows: bool = False, times_cols: bool = False) -> Inputs:
    """x, one dimension of which may be as many times longer as the group has ranks."""
    size = len(call.members(rank))
    shape = shape_of(call, call.rows[0] * (size if times_rows else 1), call["cols"] * (size if times_cols else 1))
    return {"x": inputs.tensor(call, rank, "x", shape)}


def part(tensor: Tensor, place: int, size: int, dim: int) -> Tensor:
    """One of `size` equal parts."""
    length = tensor.shape[dim] // size
    return tensor.narrow(dim, place * length, length)


def added(tensors: list[Tensor]) -> Tensor:
    """The sum, in the order of the ranks; of what is given here it is exact in every dtype."""
    total = torch.zeros_like(tensors[0])
    for tensor in tensors:
        total = total + tensor
    return total


def both_ways(
    forward: Callable[[list[Tensor], int], Tensor], backward: Callable[[list[Tensor], int], Tensor]
) -> Callable[[Call, list[Inputs]], list[Seen]]:
    """The truth of a function of the members' tensors and the own place, and of its gradient, a function of theirs."""

    def truth(call: Call, given: list[Inputs]) -> list[Seen]:
        out = [forward([given[m]["x"] for m in call.members(r)], call.place(r)) for r in range(call.world)]
        if not out[0].is_floating_point():
            return [{"out0": x} for x in out]
        back = [inputs.upstream(call, rank, "out0", x) for rank, x in enumerate(out)]
        gradients = [backward([back[m] for m in call.members(r)], call.place(r)) for r in range(call.world)]
        return [{"out0": x, "grad/x": g} for x, g in zip(out, gradients, strict=True)]

    return truth


def _own(them: list[Tensor], place: int) -> Tensor:
    return them[place]


def _sum(them: list[Tensor], place: int) -> Tensor:
    return added(them)


def _joined(dim: int, them: list[Tensor], place: int) -> Tensor:
    return torch.cat(them, dim)


def _own_part(dim: int, them: list[Tensor], place: int) -> Tensor:
    return part(them[place], place, len(them), dim)


def _sum_of_parts(dim: int, them: list[Tensor], place: int) -> Tensor:
    return added([part(tensor, place, len(them), dim) for tensor in them])


def _exchanged(taken: int, joined: int, them: list[Tensor], place: int) -> Tensor:
    """Of each the part for me along one dimension, joined along the other."""
    return torch.cat([part(tensor, place, len(them), taken) for tensor in them], joined)


# ---- with splits -----------------------------------------------------------------------------------------------


def pieces(call: Call, rank: int) -> list[int]:
    """How many rows each member has: its own number where splits are asked for."""
    return [call.rows[m] if call["splits"] else call.rows[0] for m in call.members(rank)]


def _gather_inputs(call: Call, rank: int) -> Inputs:
    shape = shape_of(call, pieces(call, rank)[call.place(rank)], call["cols"])
    return {"x": inputs.tensor(call, rank, "x", shape)}


def _scatter_inputs(call: Call, rank: int) -> Inputs:
    return {"x": inputs.tensor(call, rank, "x", shape_of(call, sum(pieces(call, rank)), call["cols"]))}


def _gathered(call: Call, given: list[Inputs]) -> list[Seen]:
    def backward(back: list[Tensor], rank: int, place: int) -> Tensor:
        own = [gradient.split(pieces(call, rank))[place] for gradient in back]
        return added(own) if call["tensor_parallel_output_grad"] else own[place]

    return _with_splits(call, given, lambda them, rank, place: torch.cat(them), backward)


def _reduce_scattered(call: Call, given: list[Inputs]) -> list[Seen]:
    def forward(them: list[Tensor], rank: int, place: int) -> Tensor:
        return added([tensor.split(pieces(call, rank))[place] for tensor in them])

    return _with_splits(call, given, forward, lambda back, rank, place: torch.cat(back))


Sided = Callable[[list[Tensor], int, int], Tensor]


def _with_splits(call: Call, given: list[Inputs], forward: Sided, backward: Sided) -> list[Seen]:
    def over(tensors: list[Tensor], function: Sided) -> list[Tensor]:
        return [function([tensors[m] for m in call.members(r)], r, call.place(r)) for r in range(call.world)]

    out = over([given[rank]["x"] for rank in range(call.world)], forward)
    if not out[0].is_floating_point():
        return [{"out0": x} for x in out]
    gradients = over([inputs.upstream(call, rank, "out0", x) for rank, x in enumerate(out)], backward)
    return [{"out0": x, "grad/x": g} for x, g in zip(out, gradients, strict=True)]


def _no_splits_of_copies(call: Call) -> Call:
    """A gradient that is the same on all ranks goes with equal shares only: nobody asks for both."""
    return call if call["tensor_parallel_output_grad"] else with_arguments(call, splits=False)


# ---- all to all ------------------------------------------------------------------------------------------------


def counts(call: Call, rank: int) -> list[list[int]]:
    """How many rows each member sends to each, by place."""
    them = call.members(rank)
    if not call["splits"]:
        return [[call.rows[0]] * len(them) for _ in them]
    return [inputs.integers(call, m, "counts", (len(them),), 0, max(call.rows)).tolist() for m in them]


def _all_to_all_inputs(call: Call, rank: int) -> Inputs:
    sent = sum(counts(call, rank)[call.place(rank)])
    return {"x": inputs.tensor(call, rank, "x", shape_of(call, sent, call["cols"]))}


def _all_to_all(call: Call, given: list[Inputs]) -> list[Seen]:
    def forward(them: list[Tensor], rank: int, place: int) -> Tensor:
        sent = counts(call, rank)
        return torch.cat([tensor.split(sent[other])[place] for other, tensor in enumerate(them)])

    def backward(back: list[Tensor], rank: int, place: int) -> Tensor:
        sent = counts(call, rank)
        took = [[row[other] for row in sent] for other in range(len(sent))]
        return torch.cat([gradient.split(took[other])[place] for other, gradient in enumerate(back)])

    return _with_splits(call, given, forward, backward)


_moved = partial(Promise, dtypes=MOVED, arguments=WIDE)
_added = partial(Promise, dtypes=ADDED, arguments=WIDE)
_SPLIT: Mapping[str, tuple] = {**WIDE, "splits": (False, True)}
_flat: Mapping[str, tuple] = {**WIDE, "dims": (2,)}
_long, _broad = partial(one, times_rows=True), partial(one, times_cols=True)
PROMISES = {
    "copy_to_tensor_model_parallel_region": _moved(inputs=one, truth=both_ways(_own, _sum)),
    "reduce_from_tensor_model_parallel_region": _added(inputs=one, truth=both_ways(_sum, _own)),
    "scatter_to_tensor_model_parallel_region": _moved(
        inputs=_broad, truth=both_ways(partial(_own_part, -1), partial(_joined, -1))
    ),
    "gather_from_tensor_model_parallel_region": _moved(
        inputs=one, truth=both_ways(partial(_joined, -1), partial(_own_part, -1))
    ),
    "scatter_to_sequence_parallel_region": _moved(
        inputs=_long, truth=both_ways(partial(_own_part, 0), partial(_joined, 0))
    ),
    "gather_from_sequence_parallel_region": Promise(
        inputs=_gather_inputs,
        truth=_gathered,
        dtypes=MOVED,
        uneven=True,
        arguments={**_SPLIT, "tensor_parallel_output_grad": (True, False), "buffer": (False, True)},
        fit=_no_splits_of_copies,
    ),
    "reduce_scatter_to_sequence_parallel_region": Promise(
        inputs=_scatter_inputs,
        truth=_reduce_scattered,
        dtypes=ADDED,
        uneven=True,
        arguments={**_SPLIT, "buffer": (False, True)},
    ),
    "all_gather_last_dim_from_tensor_parallel_region": _added(
        inputs=one, truth=both_ways(partial(_joined, -1), partial(_sum_of_parts, -1))
    ),
    "reduce_scatter_last_dim_to_tensor_parallel_region": _added(
        inputs=_broad, truth=both_ways(partial(_sum_of_parts, -1), partial(_joined, -1))
    ),
    "all_to_all": Promise(
        inputs=_all_to_all_inputs,
        truth=_all_to_all,
        dtypes=MOVED,
        uneven=True,
        arguments=_SPLIT,
    ),
    "all_to_all_sp2hp": Promise(
        inputs=_broad,
        dtypes=MOVED,
        arguments=_flat,
        truth=both_ways(partial(_exchanged, -1, 0), partial(_exchanged, 0, -1)),
    ),
    "all_to_all_hp2sp": Promise(
        inputs=_long,
        dtypes=MOVED,
        arguments=_flat,
        truth=both_ways(partial(_exchanged, 0, -1), partial(_exchanged, -1, 0)),
    ),
}
