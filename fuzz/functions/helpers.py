"""What small helpers of utils, tensor_parallel, embeddings, fusions and masks promise. Knows no megatron-core."""

import math

import torch
from torch import Tensor

from fuzz.functions import inputs
from fuzz.functions.call import Call
from fuzz.functions.mappings import added
from fuzz.functions.promise import ADDED, FLOATS, MOVED, Inputs, Promise, Refused, Seen, each, local

ONE = ("tp",)
COLS = {"cols": (1, 2, 4, 6)}


def matrix(call: Call, rank: int) -> Inputs:
    return {"x": inputs.tensor(call, rank, "x", (call.rows[rank], call["cols"]))}


def _dtype(call: Call) -> torch.dtype:
    return inputs.dtype_of(call.dtype)


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
        return {"out0": torch.stack(own) if own else torch.empty(0, dtype=_dtype(call))}

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


SIZES = ((2, 3), (1, 2), (4, 4))


# ---- context parallelism ---------------------------------------------------------------------------------------


def _positions(call: Call, rank: int, kind: str) -> list[int]:
    """Of 2·CP chunks the place-th from the front and the place-th from the end."""
    size, place = len(call.members(rank, kind)), call.place(rank, kind)
    width = call["chunk"]
    return [c * width + i for c in (place, 2 * size - place - 1) for i in range(width)]


def length(call: Call, rank: int, kind: str = "cp") -> int:
    return 2 * len(call.members(rank, kind)) * call["chunk"]


def _batch(call: Call, rank: int) -> Inputs:
    rows, width = call.rows[0], length(call, rank)
    return {
        "tokens": inputs.tensor(call, rank, "tokens", (rows, width)),
        "attention_mask": inputs.tensor(call, rank, "mask", (rows, 1, width, 3)),
    }


def _batch_here(call: Call, given: list[Inputs]) -> list[Seen]:
    def of(rank: int) -> Seen:
        own = _positions(call, rank, "cp") if len(call.members(rank, "cp")) > 1 else slice(None)
        return {"out0": given[rank]["tokens"][:, own], "out1": given[rank]["attention_mask"][:, :, own], "out2": None}

    return each(call, of)


def _embedding(call: Call, rank: int) -> Inputs:
    shape = [call.rows[0], 1, 2]
    shape.insert(call["dim"], length(call, rank, call.group))
    return {"x": inputs.tensor(call, rank, "x", shape)}


def _embedding_here(call: Call, given: list[Inputs]) -> list[Seen]:
    def of(rank: int) -> Seen:
        own = torch.tensor(_positions(call, rank, call.group))
        seen: Seen = {"out0": given[rank]["x"].index_select(call["dim"], own)}
        back = inputs.upstream(call, rank, "out0", seen["out0"])
        return {**seen, "grad/x": torch.zeros_like(given[rank]["x"]).index_add(call["dim"], own, back)}

    return each(call, of)


def _roll_inputs(call: Call, rank: int) -> Inputs:
    size = len(call.members(rank))
    width = 2 * call["chunk"] if size > 1 else call["chunk"]
    return {"x": inputs.tensor(call, rank, "x", (call.rows[0], width))}


def _rolled(call: Call, given: list[Inputs]) -> list[Seen]:
    """Each position gets the value of the next one of the whole sequence, the last one 0; and the sum of the own."""

    def of(rank: int) -> Seen:
        them, size = call.members(rank), len(call.members(rank))
        if size == 1:
            own, whole = list(range(call["chunk"])), given[rank]["x"]
        else:
            own = _positions(call, rank, call.group)
            whole = torch.zeros(call.rows[0], 2 * size * call["chunk"], dtype=_dtype(call))
            for member in them:
                whole[:, _positions(call, member, call.group)] = given[member]["x"]
        after = torch.cat([whole[:, 1:], torch.zeros_like(whole[:, :1])], 1)[:, own]
        return {"out0": after, "out1": after.sum()}

    return each(call, of)


# ---- buffers and broadcasts ------------------------------------------------------------------------------------


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
        return {"out0": added(parts).to(_dtype(call))}

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


# ---- masks, activations, rotary positions ----------------------------------------------------------------------


def _causal(call: Call, given: list[Inputs]) -> list[Seen]:
    n = call["width"]
    mask = torch.tensor([[column > row for column in range(n)] for row in range(n)], dtype=torch.bool).reshape(n, n)
    return [{"out0": mask}] * call.world


def _sliding(call: Call, given: list[Inputs]) -> list[Seen]:
    """True is masked: a query at position i (they are the last of the keys') sees keys i - left to i + right."""
    queries, keys, (left, right) = call["width"], call["width"] + call["before"], call["window"]
    here = [row + keys - queries for row in range(queries)]
    mask = [[not (i - left <= column <= i + right) for column in range(keys)] for i in here]
    return [{"out0": torch.tensor(mask, dtype=torch.bool).reshape(queries, keys)}] * call.world


def _masked_inputs(call: Call, rank: int) -> Inputs:
    return {**matrix(call, rank), "mask": inputs.tensor(call, rank, "mask", (call.rows[rank], call["cols"]), "bool")}


def _masked(call: Call, given: list[Inputs]) -> list[Seen]:
    def of(rank: int) -> Seen:
        x, mask = given[rank]["x"], given[rank]["mask"]
        return {"out0": torch.where(mask, torch.full_like(x, -10000.0), x)}

    return each(call, of)


def _tanh_gelu(call: Call, rank: int, x: Tensor) -> tuple:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))), _dtype(call)


def _gelu(call: Call, rank: int, x: Tensor) -> tuple:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2))), _dtype(call)


def _halves(call: Call, rank: int) -> Inputs:
    found = {"x": inputs.tensor(call, rank, "x", (call.rows[rank], 2 * call["cols"]))}
    if dict(call.arguments).get("bias"):
        found["bias"] = inputs.tensor(call, rank, "bias", (2 * call["cols"],))
    if dict(call.arguments).get("weights"):
        found["weights"] = inputs.tensor(call, rank, "weights", (call.rows[rank], 1), "float32")
    return found


def _swiglu(call: Call, rank: int, x: Tensor, bias: Tensor | None = None, weights: Tensor | None = None) -> tuple:
    """silu of the first half times the second, times the weights of tokens; as the dtype of x."""
    first, second = (x if bias is None else x + bias).chunk(2, -1)
    out = first * torch.sigmoid(first) * second
    return out if weights is None else out * weights, _dtype(call)


def _added_inputs(call: Call, rank: int) -> Inputs:
    found = {**matrix(call, rank), "residual": inputs.tensor(call, rank, "residual", (call.rows[rank], call["cols"]))}
    return {**found, "bias": inputs.tensor(call, rank, "bias", (call["cols"],))} if call["bias"] else found


def _residual(call: Call, rank: int, x: Tensor, residual: Tensor, bias: Tensor | None = None) -> tuple:
    return residual + (x if bias is None else x + bias), _dtype(call)


def whole_width(call: Call, rank: int) -> int:
    """The length of the sequence: with several ranks of CP 2·CP chunks of `width` each."""
    size = len(call.members(rank, "cp"))
    return call["width"] * (2 * size if size > 1 else 1)


def _angles(call: Call, given: list[Inputs]) -> list[Seen]:
    """Position p and pair i: p / base^(2i/dim), pairs one after the other or each twice; the rank's own positions."""

    def of(rank: int) -> Seen:
        dim, half = 2 * call["cols"], call["cols"]
        size, place, width = len(call.members(rank, "cp")), call.place(rank, "cp"), call["width"]
        chunks = (place, 2 * size - place - 1) if size > 1 else (0,)
        rows = []
        for p in (chunk * width + i + call["offset"] for chunk in chunks for i in range(width)):
            angles = [p / call["base"] ** (2 * i / dim) for i in range(half)]
            rows.append([a for a in angles for _ in (0, 1)] if call["interleaved"] else angles * 2)
        return {"out0": torch.tensor(rows, dtype=torch.float32).reshape(-1, 1, 1, dim)}

    return each(call, of)


def _rotary_inputs(call: Call, rank: int) -> Inputs:
    shape = call.rows[rank], 1, 2, 2 * call["cols"] + call["passed"]
    freqs = inputs.tensor(call, rank, "freqs", (call.rows[rank], 1, 1, call["cols"]), "float32")
    twice = freqs.repeat_interleave(2, -1) if call["interleaved"] else torch.cat([freqs, freqs], -1)
    return {"t": inputs.tensor(call, rank, "t", shape), "freqs": twice}


def _rotated(call: Call, rank: int, t: Tensor, freqs: Tensor) -> tuple:
    """Each pair turned by its angle; what lies beyond the rotary dimensions is passed."""
    half, freqs = call["cols"], freqs.detach()
    columns = list(t.unbind(-1))
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if call["interleaved"] else (i, i + half)
        cos, sin = torch.cos(freqs[..., a]), torch.sin(freqs[..., a])
        x, y = t[..., a], t[..., b]
        columns[a], columns[b] = x * cos - y * sin, y * cos + x * sin
    return torch.stack(columns, -1), _dtype(call)


def _wgrad(call: Call, given: list[Inputs]) -> list[Seen]:
    """The first two dimensions as one."""

    def of(rank: int) -> Seen:
        grad, total = given[rank]["grad_output"], given[rank]["total"]
        rows = [(i, j) for i in range(call.rows[0]) for j in range(2)]
        return {
            f"out{n}": torch.stack([x[at] for at in rows]) if rows else x.new_empty(0, call["cols"])
            for n, x in enumerate((grad, total))
        }

    return each(call, of)


def _three(call: Call, rank: int) -> Inputs:
    shape = call.rows[0], 2, call["cols"]
    return {name: inputs.tensor(call, rank, name, shape) for name in ("grad_output", "total")}


ROTARY = {"cols": (1, 2, 4), "interleaved": (False, True)}
PROMISES = {
    "divide": Promise(
        truth=_divide,
        arguments={"numerator": (0, 1, 2, 6, 7, 12), "denominator": (1, 2, 3, 7)},
        dtypes=("float32",),
        groups=ONE,
        gradients=False,
    ),
    "split_tensor_along_last_dim": Promise(
        inputs=matrix, truth=_split, arguments={**COLS, "parts": (1, 2, 3), "copied": (False, True)}, dtypes=MOVED,
        groups=ONE, uneven=True, gradients=False,
    ),
    "split_tensor_into_1d_equal_chunks": Promise(
        inputs=_whole, truth=_flat_share, arguments={**COLS, "copied": (False, True)}, dtypes=MOVED, gradients=False
    ),
    "gather_split_1d_tensor": Promise(
        inputs=_vector, truth=_flat_all, dtypes=MOVED, gradients=False, contiguous=(True,)  # one of the equal chunks
    ),
    "process_groups": Promise(truth=_group, dtypes=("float32",), gradients=False),
    "make_viewless_tensor": Promise(
        inputs=matrix, truth=_viewless, arguments={**COLS, "keep_graph": (True, False)}, groups=ONE, uneven=True
    ),
    "GlobalMemoryBuffer": Promise(truth=_buffer, dtypes=MOVED, groups=ONE, gradients=False),
    "get_batch_on_this_cp_rank": Promise(
        inputs=_batch, truth=_batch_here, arguments={"chunk": (1, 2, 3)}, dtypes=MOVED, groups=("cp",), gradients=False,
        rows=(1, 2, 3),
    ),
    "get_pos_emb_on_this_cp_rank": Promise(
        inputs=_embedding, truth=_embedding_here, arguments={"chunk": (1, 2), "dim": (0, 1)}, rows=(1, 2, 3)
    ),
    "roll_tensor": Promise(
        inputs=_roll_inputs, truth=_rolled, arguments={"chunk": (1, 2, 3)}, dtypes=ADDED, groups=("cp",),
        gradients=False, rows=(1, 2, 3), rounding=1.0,
    ),
    "shard_buffer": Promise(
        inputs=_vector, truth=_shards, arguments={"parts": (1, 2, 3)}, dtypes=MOVED, groups=ONE, gradients=False,
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
    "get_default_causal_mask": Promise(
        truth=_causal, arguments={"width": (1, 2, 5)}, dtypes=("bool",), groups=ONE, gradients=False
    ),
    "get_sliding_window_causal_mask": Promise(
        truth=_sliding,
        arguments={"width": (1, 2, 5), "before": (0, 1, 4), "window": ((1, 0), (0, 0), (2, 0), (1, 1))},
        dtypes=("bool",), groups=ONE, gradients=False,
    ),
    "attention_mask_func": Promise(
        inputs=_masked_inputs, truth=_masked, arguments=COLS, groups=ONE, uneven=True, gradients=False, changes=("x",)
    ),
    "gelu_impl": Promise(
        inputs=matrix, truth=local(_tanh_gelu), arguments=COLS, groups=ONE, uneven=True, rounding=16.0, floor=4.0
    ),
    "erf_gelu": Promise(
        inputs=matrix, truth=local(_gelu), arguments=COLS, groups=ONE, uneven=True, rounding=64.0, floor=4.0,
        single=True,  # its root of two has six digits
    ),
    "bias_swiglu_impl": Promise(
        inputs=_halves, truth=local(_swiglu), arguments={**COLS, "bias": (False, True)}, groups=ONE, uneven=True,
        rounding=16.0, floor=8.0,
    ),
    "weighted_bias_swiglu_impl": Promise(
        inputs=_halves, truth=local(_swiglu), arguments={**COLS, "weights": (True,)}, groups=ONE, uneven=True,
        rounding=16.0, floor=8.0, coarse=True,
    ),
    "bias_dropout_add": Promise(
        inputs=_added_inputs, truth=local(_residual), groups=ONE, uneven=True,
        arguments={**COLS, "bias": (False, True), "training": (True, False), "fused": (False, True)},
        rounding=2.0,
    ),
    "RotaryEmbedding": Promise(
        truth=_angles,
        arguments={**ROTARY, "width": (1, 2, 5), "offset": (0, 3), "base": (10000, 100)},
        dtypes=("float32",), groups=ONE, gradients=False, rounding=8.0,
    ),
    "apply_rotary_pos_emb": Promise(
        inputs=_rotary_inputs, truth=local(_rotated), arguments={**ROTARY, "passed": (0, 2)}, groups=ONE, uneven=True,
        rounding=8.0, floor=4.0, single=True,
    ),
    "prepare_input_tensors_for_wgrad_compute": Promise(
        inputs=_three, truth=_wgrad, arguments=COLS, groups=ONE, gradients=False
    ),
}  # fmt: skip
