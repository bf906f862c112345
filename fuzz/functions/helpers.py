"""What small helpers of utils, tensor_parallel, distributed and parallel_state promise. Knows no megatron-core."""

import torch

from fuzz.functions import inputs
from fuzz.functions.call import Call
from fuzz.functions.mappings import added
from fuzz.functions.promise import COLS, FLOATS, HERE, MOVED, Inputs, Promise, Refused, Seen, each

SIZES = ((2, 3), (1, 2), (4, 4))


def _divide(call: Call, given: list[Inputs]) -> list[Seen]:
    if call["numerator"] % call["denominator"]:
        raise Refused(f"{call['numerator']} / {call['denominator']}")
    return [{"out0": call["numerator"] // call["denominator"]}] * call.world


def _split(call: Call, given: list[Inputs]) -> list[Seen]:
    if call["cols"] % call["parts"]:
        raise Refused(f"cols={call['cols']} parts={call['parts']}")
    width = call["cols"] // call["parts"]

    def of(rank: int) -> Seen:
        parts = [given[rank]["x"][:, i * width : (i + 1) * width] for i in range(call["parts"])]
        return {f"out{i}": part for i, part in enumerate(parts)}

    return each(call, of)


def _whole(call: Call, rank: int) -> Inputs:
    """As many elements as the ranks of the group can share."""
    return {"x": inputs.tensor(call, rank, "x", (call.rows[0] * len(call.members(rank)), call["cols"]))}


def _flat_share(call: Call, given: list[Inputs]) -> list[Seen]:
    def of(rank: int) -> Seen:
        flat = [n for row in given[rank]["x"] for n in row]
        number = len(flat) // len(call.members(rank))
        own = flat[call.place(rank) * number : (call.place(rank) + 1) * number]
        return {"out0": torch.stack(own) if own else torch.empty(0, dtype=inputs.dtype_of(call.dtype))}

    return each(call, of)


def _vector(call: Call, rank: int) -> Inputs:
    return {"x": inputs.tensor(call, rank, "x", (call.rows[0],))}


def _flat_all(call: Call, given: list[Inputs]) -> list[Seen]:
    return each(call, lambda rank: {"out0": torch.cat([given[member]["x"] for member in call.members(rank)])})


def _group(call: Call, given: list[Inputs]) -> list[Seen]:
    def of(rank: int) -> Seen:
        return {"out0": len(call.members(rank)), "out1": call.place(rank), "out2": call.members(rank)[0]}

    return each(call, of)


def _viewless(call: Call, given: list[Inputs]) -> list[Seen]:
    def of(rank: int) -> Seen:
        x = given[rank]["x"]
        seen: Seen = {"out0": x, "out1": True}
        return {**seen, "grad/x": inputs.upstream(call, rank, "out0", x)} if call["keep_graph"] else seen

    return each(call, of)


def _buffer(call: Call, given: list[Inputs]) -> list[Seen]:
    """Shapes, whether there is room of one's own per name and dtype, and whether what fits is taken again."""
    return [{"out0": [list(s) for s in SIZES], "out1": True, "out2": True}] * call.world


def _shards(call: Call, given: list[Inputs]) -> list[Seen]:
    def of(rank: int) -> Seen:
        x, parts = given[rank]["x"], call["parts"]
        if len(x) % parts:
            raise Refused(f"{len(x)} elements in {parts}")
        size = len(x) // parts
        return {f"out{i}": x[i * size : (i + 1) * size] for i in range(parts)}

    return each(call, of)


def _both(call: Call, rank: int) -> Inputs:
    found = {"a": inputs.tensor(call, rank, "a", (call.rows[0], 2)), "b": inputs.tensor(call, rank, "b", (3,))}
    return found


def _first_one(call: Call, given: list[Inputs]) -> list[Seen]:
    def of(rank: int) -> Seen:
        first = given[call.members(rank)[0]]
        return {"out0": first["a"], "out1": first["b"]}

    return each(call, of)


def _long_vector(call: Call, rank: int) -> Inputs:
    return {"x": inputs.tensor(call, rank, "x", (call.rows[0] * len(call.members(rank)),))}


def _scattered(call: Call, given: list[Inputs]) -> list[Seen]:
    """The own share of the sum, added in float32."""

    def of(rank: int) -> Seen:
        size, place, number = len(call.members(rank)), call.place(rank), call.rows[0]
        assert size
        parts = [given[m]["x"][place * number : (place + 1) * number].float() for m in call.members(rank)]
        return {"out0": added(parts).to(inputs.dtype_of(call.dtype))}

    return each(call, of)


def _hashes(call: Call, given: list[Inputs]) -> list[Seen]:
    """Whether the own parameters are those of the first member, to the bit; of all members where it cross-checks."""

    def of(rank: int) -> Seen:
        them = call.members(rank, "dp")
        first = given[them[0]]["x"]
        alike = [torch.equal(given[m]["x"], first if call["cross"] else given[rank]["x"]) for m in them]
        return {"out0": all(alike) if call["cross"] else torch.equal(given[rank]["x"], first)}

    return each(call, of)


def _replicas(call: Call, rank: int) -> Inputs:
    """The same on all ranks, or on the last one of the world another."""
    odd = call["odd"] and rank == call.world - 1
    return {"x": inputs.tensor(call, rank if odd else inputs.ALL, "x", (call.rows[0], 2))}


PROMISES = {
    "divide": Promise(
        truth=_divide,
        arguments={"numerator": (0, 1, 2, 6, 7, 12), "denominator": (1, 2, 3, 7)},
        dtypes=("float32",),
        groups=HERE,
        gradients=False,
    ),
    "split_tensor_along_last_dim": Promise(
        inputs=inputs.matrix, truth=_split, arguments={**COLS, "parts": (1, 2, 3), "copied": (False, True)},
        dtypes=MOVED, groups=HERE, uneven=True, gradients=False,
    ),
    "split_tensor_into_1d_equal_chunks": Promise(
        inputs=_whole, truth=_flat_share, arguments={**COLS, "copied": (False, True)}, dtypes=MOVED, gradients=False
    ),
    "gather_split_1d_tensor": Promise(
        inputs=_vector, truth=_flat_all, dtypes=MOVED, gradients=False, contiguous=(True,)  # one of the equal chunks
    ),
    "process_groups": Promise(truth=_group, dtypes=("float32",), gradients=False),
    "make_viewless_tensor": Promise(
        inputs=inputs.matrix, truth=_viewless, arguments={**COLS, "keep_graph": (True, False)}, groups=HERE, uneven=True
    ),
    "GlobalMemoryBuffer": Promise(truth=_buffer, dtypes=MOVED, groups=HERE, gradients=False),
    "shard_buffer": Promise(
        inputs=_vector, truth=_shards, arguments={"parts": (1, 2, 3)}, dtypes=MOVED, groups=HERE, gradients=False,
        rows=(1, 2, 3, 6, 0),
    ),
    "broadcast_data": Promise(inputs=_both, truth=_first_one, dtypes=MOVED, gradients=False, rows=(1, 2, 3)),
    "reduce_scatter_with_fp32_accumulation": Promise(
        inputs=_long_vector, truth=_scattered, dtypes=FLOATS, gradients=False
    ),
    "check_param_hashes_across_dp_replicas": Promise(
        inputs=_replicas, truth=_hashes, arguments={"odd": (False, True), "cross": (False, True)}, groups=("dp",),
        dtypes=("float32", "bfloat16", "float64"), gradients=False, rows=(2, 3),
    ),
}  # fmt: skip
