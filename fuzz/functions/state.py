"""What the helpers of state dicts and checkpoints promise: where shards lie, keys, trees. Knows no megatron-core."""

from collections.abc import Iterator
from typing import Any

from fuzz.functions import inputs
from fuzz.functions.call import Call
from fuzz.functions.promise import MOVED, Inputs, Promise, Refused, Seen, each

SHARD = {"cols": (1, 2, 3), "axis": (0, 1), "before": (0, 1, 2)}


def _matrix(call: Call, rank: int) -> Inputs:
    return {"x": inputs.tensor(call, rank, "x", (call.rows[rank], call["cols"]))}


def _shard(call: Call, rank: int, axis: int | None) -> Seen:
    """Local shape, global shape, offset, fragments of each axis, replica; axes before it count as whole."""
    size, place = (len(call.members(rank, "tp")), call.place(rank, "tp")) if axis is not None else (1, 0)
    local, before = [call.rows[rank], call["cols"]], call["before"]
    parts = [size if axis == i else 1 for i in range(2)]
    places = [place if axis == i else 0 for i in range(2)]
    replica = (0, 0 if axis is not None else call.place(rank, "tp"), call.place(rank, "dp-cp"))
    front = [(i % 2, 2) for i in range(before)]  # (index, number) of the axes that are put before
    return {
        "out0": local,
        "out1": [n for _, n in front] + [n * p for n, p in zip(local, parts, strict=True)],
        "out2": [i for i, _ in front] + [n * p for n, p in zip(local, places, strict=True)],
        "out3": [n for _, n in front] + parts,
        "out4": list(replica),
    }


def front(call: Call) -> tuple[tuple[int, int, int], ...]:
    """The offsets of axes put before the tensor's own: (axis, index, number)."""
    return tuple((i, i % 2, 2) for i in range(call["before"]))


def _sharded(call: Call, given: list[Inputs]) -> list[Seen]:
    return each(call, lambda rank: _shard(call, rank, call["axis"]))


def _whole(call: Call, given: list[Inputs]) -> list[Seen]:
    return each(call, lambda rank: _shard(call, rank, None))


def _several(call: Call, given: list[Inputs]) -> list[Seen]:
    """The keys with their prefix; the offset and replica of the one that TP cuts, and of the one that it does not."""

    def of(rank: int) -> Seen:
        cut, not_cut = _shard(call, rank, call["axis"]), _shard(call, rank, None)
        extra = [0, call.place(rank, "tp"), call.place(rank, "dp-cp")]
        keys = ["a.cut", "a.kept", "a.linear._extra_state"]
        return {
            "out0": keys,
            "out1": [cut["out2"], cut["out4"]],
            "out2": [not_cut["out2"], not_cut["out4"]],
            "out3": extra,
        }

    return each(call, of)


def _from_offsets(call: Call, given: list[Inputs]) -> list[Seen]:
    """A shard at (axis, index, number), the index below the number; else refused."""
    index, number = call["index"], call["number"]
    if index >= number:
        raise Refused(f"index={index} number={number}")

    def of(rank: int) -> Seen:
        local, axis = [call.rows[rank], call["cols"]], call["axis"]
        whole = [n * (number if i == axis else 1) for i, n in enumerate(local)]
        return {"out0": whole, "out1": [n * (index if i == axis else 0) for i, n in enumerate(local)]}

    return each(call, of)


def _main(call: Call, given: list[Inputs]) -> list[Seen]:
    replica = call["replica"]
    return [{"out0": replica == 0 if isinstance(replica, int) else set(replica) <= {0}}] * call.world


KEYS = ("layers.0.weight", "layers.10.bias", "embedding", "layersnorm")


def _keys(call: Call, given: list[Inputs]) -> list[Seen]:
    """The keys with a prefix put before; with one in place of another; with the first that fits of a map."""
    old, new = call["old"], call["new"]
    if not all(key.startswith(old) for key in KEYS):
        raise Refused(f"old={old!r}")
    mapped = [next((n + k[len(o) :] for o, n in mapping(call).items() if k.startswith(o)), k) for k in KEYS]
    return [{"out0": [new + k for k in KEYS], "out1": [new + k[len(old) :] for k in KEYS], "out2": mapped}] * call.world


def mapping(call: Call) -> dict[str, str]:
    return {"layers.1": "x.", "layers": call["new"], "": "rest."} if call["catch_all"] else {"layers.": "decoder."}


# ---- trees -----------------------------------------------------------------------------------------------------


def tree(call: Call, name: str = "tree", depth: int = 2) -> Any:
    """Dicts and lists of small numbers, empty ones too, from the seed."""
    numbers = iter(inputs.integers(call, inputs.ALL, name, (200,), 0, 9).tolist())

    def grown(left: int) -> Any:
        kind, number = next(numbers), next(numbers) % 4
        if left == 0 or kind < 4:
            return kind
        if kind < 7:
            return [grown(left - 1) for _ in range(number)]
        return {f"k{i}": grown(left - 1) for i in range(number)}

    return {f"k{i}": grown(depth) for i in range(call["width"])}


def leaves(value: Any) -> Iterator[Any]:
    """All that is neither dict nor list, in order."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from leaves(inner)
    else:
        yield value


def _mapped_tree(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _mapped_tree(v) for k, v in value.items()}
    return [_mapped_tree(v) for v in value] if isinstance(value, list) else value + 100


def _trees(call: Call, given: list[Inputs]) -> list[Seen]:
    """All values in order; each mapped, in place and not; split by a predicate none is lost and none is in both."""
    made = tree(call)
    values = list(leaves(made))
    even, odd = [v for v in values if v % 2 == 0], [v for v in values if v % 2]
    mapped = _mapped_tree(made)
    return [{"out0": values, "out1": mapped, "out2": mapped, "out3": even, "out4": odd}] * call.world


def _split_and_merged(call: Call, given: list[Inputs]) -> list[Seen]:
    """What was split, lists as dicts, and merged again has every value at its place."""
    return [{"out0": dict(sorted(_paths(tree(call))))}] * call.world


def _paths(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _paths(inner, f"{path}/{key}")
    else:
        yield path, value


paths = _paths


def _difference(call: Call, given: list[Inputs]) -> list[Seen]:
    """Paths that only the one has, only the other, and those whose values differ: of two flat dicts."""
    one, other = flat(call, "one"), flat(call, "other")
    left, right = sorted(set(one) - set(other)), sorted(set(other) - set(one))
    apart = sorted(k for k in set(one) & set(other) if one[k] != other[k])
    return [{"out0": [(k,) for k in left], "out1": [(k,) for k in right], "out2": [(k,) for k in apart]}] * call.world


def flat(call: Call, name: str) -> dict[str, int]:
    numbers = inputs.integers(call, inputs.ALL, name, (6,), 0, 3).tolist()
    return {f"k{i}": n for i, n in enumerate(numbers[: call["width"] + 2]) if n}


# ---- parameters ------------------------------------------------------------------------------------------------


def _weights(call: Call, rank: int) -> Inputs:
    names = ("weight", "loaded")
    return {name: inputs.tensor(call, rank, name, (call.rows[rank], call["cols"])) for name in names}


def _reloaded(call: Call, given: list[Inputs]) -> list[Seen]:
    """After weights are loaded under an optimizer, its float32 copy is theirs, and so is the next step's start."""
    return each(call, lambda rank: {"out0": given[rank]["loaded"].float(), "out1": given[rank]["loaded"]})


def _attributes(call: Call, given: list[Inputs]) -> list[Seen]:
    found = [call["parallel"], call["dim"], call["stride"]]
    return [{"out0": found, "out1": found, "out2": [False, -1, 1], "out3": found}] * call.world


TREES = {"width": (0, 1, 2, 3)}
PROMISES = {
    "make_tp_sharded_tensor_for_checkpoint": Promise(
        inputs=_matrix, truth=_sharded, arguments=SHARD, dtypes=MOVED, groups=("tp",), gradients=False
    ),
    "make_sharded_tensor_for_checkpoint": Promise(
        inputs=_matrix, truth=_whole, arguments=SHARD, dtypes=MOVED, groups=("tp",), gradients=False
    ),
    "make_sharded_tensors_for_checkpoint": Promise(
        inputs=_matrix, truth=_several, arguments=SHARD, dtypes=MOVED, groups=("tp",), gradients=False
    ),
    "from_rank_offsets": Promise(
        inputs=_matrix,
        truth=_from_offsets,
        arguments={**SHARD, "index": (0, 1, 2), "number": (1, 2, 3)},
        groups=("tp",),
        gradients=False,
    ),
    "is_main_replica": Promise(
        truth=_main, arguments={"replica": (0, 1, (0, 0, 0), (0, 1), (), (0,), (2, 0))}, groups=("tp",), gradients=False
    ),
    "prefixes": Promise(
        truth=_keys,
        arguments={"old": ("", "layers", "x"), "new": ("", "decoder."), "catch_all": (False, True)},
        groups=("tp",),
        gradients=False,
    ),
    "trees": Promise(truth=_trees, arguments=TREES, groups=("tp",), gradients=False),
    "split_and_merge": Promise(truth=_split_and_merged, arguments=TREES, groups=("tp",), gradients=False),
    "diff": Promise(truth=_difference, arguments=TREES, groups=("tp",), gradients=False),
    "reload_model_params": Promise(
        inputs=_weights,
        truth=_reloaded,
        arguments={"cols": (1, 2, 3)},
        dtypes=("bfloat16",),
        rows=(1, 2, 3),
        groups=("tp",),
        gradients=False,
        changes=("weight",),
    ),
    "tensor_parallel_attributes": Promise(
        truth=_attributes,
        arguments={"parallel": (True, False), "dim": (0, 1), "stride": (1, 2)},
        groups=("tp",),
        gradients=False,
    ),
}
