"""What the functions of moe_utils promise that move tokens: grouped by expert, back again, chunks in another order.

Knows no megatron-core.
"""

import torch
from torch import Tensor

from fuzz.functions import inputs
from fuzz.functions.call import Call
from fuzz.functions.promise import MOVED, Inputs, Promise, local, with_arguments

SHAPE = {"experts": (1, 2, 4), "topk": (1, 2, 4), "hidden": (1, 3), "probs": (False, True)}


def copies(chosen: Tensor) -> list[tuple[int, int]]:
    """(token, expert) of every copy, by expert and then by token."""
    return [
        (token, expert) for expert in range(chosen.shape[1]) for token in range(len(chosen)) if chosen[token, expert]
    ]


def capacity(call: Call, rank: int) -> int:
    """How many tokens each expert has where tokens are dropped and padded: as many as there are, or half."""
    return max(1, call.rows[rank] // 2) if call.rows[rank] else 0


def chosen(call: Call, rank: int) -> Tensor:
    """The map [tokens, experts]: topk experts per token, or capacity tokens per expert."""
    tokens, experts = call.rows[rank], call["experts"]
    if call["pad"]:
        return inputs.laid(call, inputs.routing(call, rank, "map", experts, tokens, capacity(call, rank)).T)
    return inputs.routing(call, rank, "map", tokens, experts, call["topk"])


def _tokens(call: Call, rank: int) -> Inputs:
    found = {"tokens": inputs.tensor(call, rank, "tokens", (call.rows[rank], call["hidden"]))}
    found["routing_map"] = chosen(call, rank)
    if call["probs"]:
        found["probs"] = inputs.tensor(call, rank, "probs", (call.rows[rank], call["experts"]))
    return found


def _permuted(call: Call, rank: int, tokens: Tensor, routing_map: Tensor, probs: Tensor | None = None) -> list:
    order, dtype = copies(routing_map), inputs.dtype_of(call.dtype)
    from_, by = [token for token, _ in order], [expert for _, expert in order]
    moved = tokens[from_] if tokens.dtype != torch.float64 else (tokens[from_], dtype)
    kept = None if probs is None else (probs[from_, by], dtype)
    return [moved, kept, torch.tensor(from_, dtype=torch.int64)]


def _copied(call: Call, rank: int) -> Inputs:
    """Permuted tokens with what brings them back."""
    routing_map = chosen(call, rank)
    order = copies(routing_map)
    found = {
        "permuted": inputs.tensor(call, rank, "permuted", (len(order), call["hidden"])),
        "indices": torch.tensor([token for token, _ in order], dtype=torch.int64),
        "routing_map": routing_map,
    }
    if call["probs"]:
        dtype = "float32" if call["float32_probs"] else ""
        found["probs"] = inputs.tensor(call, rank, "probs", (call.rows[rank], call["experts"]), dtype)
    return found


def _restored(
    call: Call, rank: int, permuted: Tensor, indices: Tensor, routing_map: Tensor, probs: Tensor | None = None
) -> tuple:
    rows = [torch.zeros(call["hidden"], dtype=torch.float64) for _ in range(call.rows[rank])]
    for copy, (token, expert) in enumerate(copies(routing_map)):
        rows[token] = rows[token] + permuted[copy] * (1 if probs is None else probs[token, expert])
    out = torch.stack(rows) if rows else permuted.new_zeros(0, call["hidden"])
    return out, inputs.dtype_of(call.dtype)


def _fits(call: Call) -> Call:
    call = with_arguments(call, topk=min(call["topk"], call["experts"]))
    return with_arguments(call, probs=False) if call.dtype in ("int64", "bool") else call


def _chunks(call: Call, rank: int) -> Inputs:
    sizes = inputs.integers(call, rank, "sizes", (call["chunks"],), 0, 3)
    order = torch.rand(call["chunks"], generator=inputs.generator(call, rank, "order")).argsort()
    total = int(sizes.sum())
    found = {"x": inputs.tensor(call, rank, "x", (total, call["hidden"])), "split_sizes": sizes, "sorted_idxs": order}
    return {**found, "probs": inputs.tensor(call, rank, "probs", (total,))} if call["probs"] else found


def _sorted(
    call: Call, rank: int, x: Tensor, split_sizes: Tensor, sorted_idxs: Tensor, probs: Tensor | None = None
) -> list:
    firsts = [int(split_sizes[:i].sum()) for i in range(len(split_sizes))]
    rows = [row for i in sorted_idxs.tolist() for row in range(firsts[i], firsts[i] + int(split_sizes[i]))]
    dtype = inputs.dtype_of(call.dtype)
    return [(x[rows], dtype), None if probs is None else (probs[rows], dtype)]


PROMISES = {
    "permute": Promise(
        inputs=_tokens,
        truth=local(_permuted),
        arguments={**SHAPE, "pad": (False, True)},
        dtypes=MOVED,
        groups=("tp",),
        rows=(1, 2, 3, 4, 6, 0),
        uneven=True,
        fit=_fits,
    ),
    "unpermute": Promise(
        inputs=_copied,
        truth=local(_restored),
        arguments={**SHAPE, "pad": (False, True), "float32_probs": (False, True), "deterministic": (False, True)},
        groups=("tp",),
        rows=(1, 2, 3, 4, 6, 0),
        uneven=True,
        rounding=8.0,
        floor=4.0,
        single=True,
        fit=_fits,
    ),
    "sort_chunks_by_idxs": Promise(
        inputs=_chunks,
        truth=local(_sorted),
        arguments={"chunks": (1, 2, 4), "hidden": (1, 3), "probs": (False, True)},
        dtypes=MOVED,
        groups=("tp",),
    ),
}
