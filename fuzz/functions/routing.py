"""What the routing functions of moe_utils promise: choices, probabilities, drops, capacities, by loops over tokens.

Logits are distinct within a token, so that no choice is a tie. Knows no megatron-core.
"""

import math

import torch
from torch import Tensor

from fuzz.functions import inputs
from fuzz.functions.call import Call
from fuzz.functions.promise import HERE, Check, Doubt, Inputs, Promise, local, with_arguments

MARGIN = 0.01  # scores of bfloat16 nearer to one another may fall either way
TOP = {"experts": (2, 4, 8), "topk": (1, 2, 4)}


def logits(call: Call, rank: int) -> Inputs:
    found = {"logits": inputs.distinct(call, rank, "logits", (call.rows[rank], call["experts"]))}
    if dict(call.arguments).get("bias"):
        bias = torch.rand(call["experts"], generator=inputs.generator(call, rank, "bias"))
        found["expert_bias"] = bias
    if dict(call.arguments).get("mask"):
        found["padding_mask"] = inputs.tensor(call, rank, "mask", (call.rows[rank],), "bool")
    return found


def best(scores: list[float], number: int) -> list[int]:
    """The places of the greatest `number`; Doubt where the next is as great to within MARGIN."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    if 0 < number < len(scores) and scores[order[number - 1]] - scores[order[number]] < MARGIN:
        raise Doubt
    return order[:number]


def _within_groups(scores: list[float], call: Call) -> list[float]:
    """-inf outside the best groups: those of the greatest sums of their topk / group_topk best experts."""
    number, chosen = call["groups"]
    width = len(scores) // number
    sums = [sum(sorted(scores[g * width : (g + 1) * width])[-(call["topk"] // chosen) :]) for g in range(number)]
    kept = best(sums, chosen)
    return [s if i // width in kept else -math.inf for i, s in enumerate(scores)]


def _rank_scores(call: Call, row: Tensor, bias: Tensor | None) -> Tensor:
    """What is chosen by."""
    if call["score_function"] == "sigmoid":
        return torch.sigmoid(row) + (0 if bias is None else bias)
    return torch.softmax(row, 0) if call["pre_softmax"] else row


def _route(call: Call, row: Tensor, bias: Tensor | None) -> tuple[Tensor, list[int]]:
    """Probabilities [experts] and chosen experts of one token."""
    by = _rank_scores(call, row, bias).tolist()
    chosen = best(_within_groups(by, call) if call["groups"] else by, call["topk"])
    if call["score_function"] == "sigmoid":
        kept = torch.sigmoid(row)[chosen]
        kept = kept / kept.sum() if call["topk"] > 1 else kept
    else:
        kept = torch.softmax(row, 0)[chosen] if call["pre_softmax"] else torch.softmax(row[chosen], 0)
    where = torch.zeros(len(row), len(chosen), dtype=row.dtype)
    for place, expert in enumerate(chosen):
        where[expert, place] = call["scaling"] or 1.0
    return where @ kept, chosen


def _topk_routing(call: Call, rank: int, logits: Tensor, expert_bias: Tensor | None = None) -> list:
    bias = None if expert_bias is None else expert_bias.detach()
    routed = [_route(call, row, bias) for row in logits]
    chosen = torch.zeros(logits.shape, dtype=torch.bool)
    for token, (_, experts) in enumerate(routed):
        chosen[token, experts] = True
    probs = torch.stack([p for p, _ in routed]) if routed else logits * 0.0
    return [(probs, inputs.dtype_of(call.dtype)), chosen]


def _fits(call: Call) -> Call:
    """Not more experts than there are; groups that TransformerConfig lets pass and that have enough experts."""
    experts, topk = call["experts"], min(call["topk"], call["experts"])
    call = with_arguments(call, topk=topk)
    if "groups" in dict(call.arguments) and call["groups"]:
        number, chosen = call["groups"]
        width = experts // number
        if not (chosen <= topk and topk % chosen == 0 and width >= topk // chosen and experts % number == 0):
            call = with_arguments(call, groups=None)
    if dict(call.arguments).get("score_function") == "softmax" and "bias" in dict(call.arguments):
        call = with_arguments(call, bias=False)  # TransformerConfig: a bias goes with sigmoid only
    return call


def _limited(call: Call, rank: int, logits: Tensor) -> list:
    """Scores and places of the chosen, the greatest first."""
    rows = [_within_groups(row.tolist(), call) for row in logits]
    chosen = [best(row, call["topk"]) for row in rows]
    places = torch.tensor(chosen, dtype=torch.int64).reshape(len(chosen), call["topk"])
    return [(logits.gather(1, places), inputs.dtype_of(call.dtype)), places]


def _fits_groups(call: Call) -> Call:
    call = _fits(call)
    return call if call["groups"] else with_arguments(call, groups=(1, 1))


def _scores_for_balance(call: Call, rank: int, logits: Tensor, padding_mask: Tensor | None = None) -> list:
    """The map of the topk best scores, and all scores as shares. Padding has none: mask True, as the router hands it,
    though the docstring has it the other way round.
    """
    sigmoid = call["score_function"] == "sigmoid"
    chosen, shares = torch.zeros(logits.shape, dtype=torch.bool), []
    for token, row in enumerate(logits):
        kept = padding_mask is None or not bool(padding_mask[token])
        if kept:
            chosen[token, best(row.tolist(), call["topk"])] = True
        share = torch.sigmoid(row) / torch.sigmoid(row).sum() if sigmoid else torch.softmax(row, 0)
        shares.append(share * float(kept))
    scores = torch.stack(shares) if shares else logits * 0.0
    return [chosen, (scores, inputs.dtype_of(call.dtype) if sigmoid else torch.float32)]


# ---- capacity --------------------------------------------------------------------------------------------------


def _routed(call: Call, rank: int) -> Inputs:
    shape = call.rows[rank], call["experts"]
    chosen = inputs.routing(call, rank, "map", *shape, call["topk"])
    order = torch.rand(shape, generator=inputs.generator(call, rank, "probs")).argsort(0) + 1.0
    probs = (order / 32).to(inputs.dtype_of(call.dtype)) * chosen  # distinct within an expert
    return {"probs": inputs.laid(call, probs), "routing_map": chosen}


def _dropped(call: Call, rank: int, probs: Tensor, routing_map: Tensor) -> list:
    """Of each expert's tokens those with the greatest probabilities stay, or those that come first."""
    tokens, experts = probs.shape
    capacity = math.ceil(tokens * call["topk"] / experts * call["factor"])
    stay = torch.zeros(probs.shape, dtype=torch.bool)
    for expert in range(experts):
        mine = routing_map[:, expert].nonzero().flatten().tolist()
        if call["policy"] == "probs":
            mine.sort(key=lambda token: -float(probs[token, expert].detach()))
        stay[mine[:capacity], expert] = True
    dtype = inputs.dtype_of(call.dtype)
    if not call["pad"]:
        return [(probs * stay, dtype), stay]
    # What gradient a probability has that was never the router's does not matter: none is judged.
    return [(probs.detach() * stay, dtype), Check(lambda seen: _padded(seen, stay, min(capacity, tokens)))]


def _padded(seen: Tensor, stay: Tensor, capacity: int) -> str:
    if bool((stay & ~seen).any()):
        return "a token that must stay is not in the map"
    counts = seen.sum(0).tolist()
    return "" if set(counts) <= {capacity} else f"experts have {counts} tokens, not {capacity} each"


def _capacity(call: Call, given: list[Inputs]) -> list:
    found = math.ceil(call["tokens"] / call["experts"] * call["factor"])
    return [{"out0": max(found, call["least"] or 0)}] * call.world


def _map_inputs(call: Call, rank: int) -> Inputs:
    chosen = inputs.routing(call, rank, "map", call.rows[rank], call["experts"], call["topk"])
    return {"routing_map": chosen if call.dtype == "bool" else chosen.to(torch.int64)}


def _padded_map(call: Call, rank: int, routing_map: Tensor) -> Tensor:
    """The first zeros of each expert become ones until its count is a multiple, or all are ones."""
    out = routing_map.clone()
    for expert in range(out.shape[1]):
        lacking = -int(out[:, expert].sum()) % call["multiple"]
        out[(out[:, expert] == 0).nonzero().flatten()[:lacking], expert] = 1
    return out


# ---- gating, sinkhorn ------------------------------------------------------------------------------------------


def _gate_inputs(call: Call, rank: int) -> Inputs:
    hidden, rows = call["hidden"], call.rows[rank]
    shape = (rows, hidden) if call["dims"] == 2 else (rows, 2, hidden)
    found = {"inp": inputs.tensor(call, rank, "inp", shape)}
    found["weight"] = inputs.tensor(call, rank, "weight", (call["experts"], hidden))
    return {**found, "bias": inputs.tensor(call, rank, "bias", (call["experts"],))} if call["bias"] else found


def _gated(call: Call, rank: int, inp: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple:
    out = torch.stack([(inp * row).sum(-1) for row in weight], -1)
    return out if bias is None else out + bias, inputs.dtype_of(call["router_dtype"])


def _scores(call: Call, rank: int) -> Inputs:
    return {"cost": inputs.tensor(call, rank, "cost", (call.rows[rank], call["experts"]))}


def _balanced(call: Call, rank: int, cost: Tensor) -> Check:
    """Sinkhorn's marginals: every token weighs the same, every expert too; and a cost moves no ratio within 2 × 2."""
    experts = cost.shape[1]
    logs = cost.detach()

    def wrong(seen: Tensor) -> str:
        if seen.shape != cost.shape:
            return f"has shape {list(seen.shape)}"
        columns = (seen.double().sum(0) - 1 / experts).abs().max()
        if float(columns) > 1e-3:
            return f"its experts' sums are off by {float(columns):.1e}"
        crossed = seen.double().log() - logs
        crossed = crossed - crossed[:1] - crossed[:, :1] + crossed[:1, :1]
        return "" if float(crossed.abs().max()) < 1e-3 else "is no scaling of rows and columns"

    return Check(wrong)


ROUTED = {"experts": (2, 4, 8), "topk": (1, 2, 4)}
PROMISES = {
    "topk_routing_with_score_function": Promise(
        inputs=logits,
        truth=local(_topk_routing),
        arguments={
            **TOP,
            "score_function": ("softmax", "sigmoid"),
            "pre_softmax": (False, True),
            "groups": (None, (2, 1), (2, 2), (4, 2), (4, 1)),
            "scaling": (None, 2.5, 0.5),
            "bias": (False, True),
            "deterministic": (False, True),
        },
        groups=HERE,
        uneven=True,
        rounding=8.0,
        floor=1.0,
        single=True,
        fit=_fits,
    ),
    "group_limited_topk": Promise(
        inputs=logits,
        truth=local(_limited),
        arguments={**TOP, "groups": ((2, 1), (2, 2), (4, 2), (4, 1))},
        groups=HERE,
        uneven=True,
        rounding=1.0,
        fit=_fits_groups,
    ),
    "compute_routing_scores_for_aux_loss": Promise(
        inputs=logits,
        truth=local(_scores_for_balance),
        arguments={**TOP, "score_function": ("softmax", "sigmoid"), "mask": (False, True)},
        groups=HERE,
        uneven=True,
        rounding=8.0,
        floor=1.0,
        single=True,
        fit=_fits,
    ),
    "apply_router_token_dropping": Promise(
        inputs=_routed,
        truth=local(_dropped),
        arguments={
            **ROUTED, "factor": (1.0, 0.5, 2.0, 0.25, 1.5), "policy": ("probs", "position"), "pad": (False, True),
        },
        groups=HERE,
        rows=(1, 2, 3, 4, 8, 0, 12),
        uneven=True,
        fit=_fits,
    ),
    "get_capacity": Promise(
        truth=_capacity,
        arguments={
            "tokens": (0, 1, 2, 7, 64, 1000), "experts": (1, 2, 3, 8), "factor": (1.0, 0.5, 1.25, 2.0, 0.1),
            "least": (None, 1, 4),
        },
        dtypes=("float32",),
        groups=HERE,
    ),
    "pad_routing_map": Promise(
        inputs=_map_inputs,
        truth=local(_padded_map),
        arguments={**ROUTED, "multiple": (1, 2, 4, 16)},
        dtypes=("bool", "int64"),
        groups=HERE,
        uneven=True,
        changes=("routing_map",),  # "by converting some 0s to 1s in the routing map"
        fit=_fits,
    ),
    "router_gating_linear": Promise(
        inputs=_gate_inputs,
        truth=local(_gated),
        arguments={
            "hidden": (1, 2, 4), "experts": (1, 2, 4), "bias": (False, True), "dims": (2, 3),
            "router_dtype": ("float32", "float64"),
        },
        groups=HERE,
        uneven=True,
        rounding=4.0,
        single=True,
    ),
    "sinkhorn": Promise(
        inputs=_scores,
        truth=local(_balanced),
        arguments={"experts": (1, 2, 4)},
        dtypes=("float64", "float32"),
        rows=(1, 2, 3, 4),
        groups=HERE,
        uneven=True,
        gradients=False,
    ),
}  # fmt: skip
