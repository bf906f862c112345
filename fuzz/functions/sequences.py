"""What helpers of positions promise: context parallelism, masks, rotary embeddings. Knows no megatron-core."""

import torch
from torch import Tensor

from fuzz.functions import inputs
from fuzz.functions.call import Call
from fuzz.functions.promise import ADDED, HERE, MOVED, Inputs, Promise, Seen, each, local


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
            whole = torch.zeros(call.rows[0], 2 * size * call["chunk"], dtype=inputs.dtype_of(call.dtype))
            for member in them:
                whole[:, _positions(call, member, call.group)] = given[member]["x"]
        after = torch.cat([whole[:, 1:], torch.zeros_like(whole[:, :1])], 1)[:, own]
        return {"out0": after, "out1": after.sum()}

    return each(call, of)


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
    return torch.stack(columns, -1), inputs.dtype_of(call.dtype)


ROTARY = {"cols": (1, 2, 4), "interleaved": (False, True)}
PROMISES = {
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
    "get_default_causal_mask": Promise(
        truth=_causal, arguments={"width": (1, 2, 5)}, dtypes=("bool",), groups=HERE, gradients=False
    ),
    "get_sliding_window_causal_mask": Promise(
        truth=_sliding,
        arguments={"width": (1, 2, 5), "before": (0, 1, 4), "window": ((1, 0), (0, 0), (2, 0), (1, 1))},
        dtypes=("bool",), groups=HERE, gradients=False,
    ),
    "RotaryEmbedding": Promise(
        truth=_angles,
        arguments={**ROTARY, "width": (1, 2, 5), "offset": (0, 3), "base": (10000, 100)},
        dtypes=("float32",), groups=HERE, gradients=False, rounding=8.0,
    ),
    "apply_rotary_pos_emb": Promise(
        inputs=_rotary_inputs, truth=local(_rotated), arguments={**ROTARY, "passed": (0, 2)}, groups=HERE, uneven=True,
        rounding=8.0, floor=4.0, single=True,
    ),
}  # fmt: skip
