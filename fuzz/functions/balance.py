"""What the balance losses of moe_utils promise, their log over all ranks, and the bias of experts. No megatron-core."""

import torch
from torch import Tensor

from fuzz.functions import inputs
from fuzz.functions.call import Call
from fuzz.functions.mappings import added
from fuzz.functions.promise import Inputs, Promise, Seen, each, local

COEFF = (1.0, 0.01, 0.0)
PART = {"experts": (2, 4, 8), "topk": (1, 2)}


def _probs(call: Call, rank: int) -> Inputs:
    rows, experts = call.rows[rank], call["experts"]
    found = {"probs": inputs.positive(call, rank, "probs", (rows, experts))}
    found["tokens"] = inputs.routing(call, rank, "map", rows, experts, call["topk"]).sum(0)
    return {**found, "mask": inputs.tensor(call, rank, "mask", (rows,), "bool")} if call["mask"] else found


def _switch(call: Call, rank: int, probs: Tensor, tokens: Tensor, mask: Tensor | None = None) -> tuple:
    """E · Σ f_i · P_i with f_i = tokens of i / (T · topk) and P_i = Σ probabilities of i / T; mask True is valid."""
    total, kept = call["total"], probs if mask is None else probs[mask]
    terms = [tokens[i] / (total * call["topk"]) * kept[:, i].sum() / total for i in range(call["experts"])]
    return call["experts"] * call["coeff"] * torch.stack(terms).sum(), inputs.dtype_of(call.dtype)


def _logits(call: Call, rank: int) -> Inputs:
    rows = call.rows[rank]
    found = {"logits": inputs.tensor(call, rank, "logits", (rows, call["experts"]))}
    return {**found, "mask": inputs.tensor(call, rank, "mask", (rows,), "bool")} if call["mask"] else found


def _z(call: Call, rank: int, logits: Tensor, mask: Tensor | None = None) -> tuple:
    """The mean over valid tokens (mask False) of the squared log of the sum of exponentials; 0 where there is none."""
    valid = [row for i, row in enumerate(logits) if mask is None or not mask[i]]
    squares = [row.exp().sum().log() ** 2 for row in valid]
    mean = torch.stack(squares).mean() if squares else 0.0 * logits.sum()
    return mean * call["coeff"], inputs.dtype_of(call.dtype)


def _map(call: Call, rank: int) -> Inputs:
    chosen = inputs.routing(call, rank, "map", call.rows[rank], call["experts"], call["topk"])
    if call["mask"]:
        chosen = chosen & inputs.tensor(call, rank, "mask", (call.rows[rank], 1), "bool")
    return {"routing_map": chosen}


def _counts(call: Call, given: list[Inputs]) -> list[Seen]:
    """Tokens per expert over the group; tokens of this rank; tokens over the group. Floats where masked."""

    def of(rank: int) -> Seen:
        maps = [given[member]["routing_map"] for member in call.members(rank)]
        per_expert = added([chosen.sum(0) for chosen in maps])
        if not call["mask"]:
            return {"out0": per_expert, "out1": call.rows[rank], "out2": sum(len(chosen) for chosen in maps)}
        valid = [torch.tensor(int(chosen.any(1).sum()), dtype=torch.float32) for chosen in maps]
        return {"out0": per_expert, "out1": valid[call.place(rank)], "out2": added(valid)}

    return each(call, of)


def _bias(call: Call, rank: int) -> Inputs:
    tokens = inputs.integers(call, rank, "tokens", (call["experts"],), 0, 9)
    return {"tokens": tokens, "bias": inputs.tensor(call, inputs.ALL, "bias", (call["experts"],), "float32")}


def _updated(call: Call, given: list[Inputs]) -> list[Seen]:
    """Up by the rate where an expert has fewer tokens than the mean over TP × CP × DP, down where it has more."""

    def of(rank: int) -> Seen:
        total = added([given[member]["tokens"] for member in call.members(rank, "tp-dp-cp")]).tolist()
        mean = sum(total) / len(total)
        signs = [(mean > n) - (mean < n) for n in total]
        return {"out0": given[rank]["bias"] + torch.tensor(signs, dtype=torch.float32) * call["rate"]}

    return each(call, of)


# ---- the log ---------------------------------------------------------------------------------------------------


def _losses(call: Call, rank: int) -> Inputs:
    """A loss for each layer that the rank logs: as on a stage of a pipeline, only its own; the others have none."""
    return {f"loss{i}": inputs.tensor(call, rank, f"loss{i}", (), "float32") for i in range(call["layers"])}


def mine(call: Call, rank: int) -> list[int]:
    """The layers (from 0) that a rank logs: every pp-th."""
    here = call.place(rank, "pp")
    return [i for i in range(call["layers"]) if i % len(call.members(rank, "pp")) == here]


def _logged(call: Call, given: list[Inputs]) -> list[Seen]:
    """The values by layer: summed over the pipeline, then over the reducing group, then the mean over data parallel
    ranks where that group has none of them, then the mean over the averaging group.
    """

    def over(values: list[Tensor], kind: str, mean: bool) -> list[Tensor]:
        members = [call.members(rank, kind) for rank in range(call.world)]
        return [added([values[m] for m in them]) / (len(them) if mean else 1) for them in members]

    values = []
    for rank in range(call.world):
        own = [given[rank][f"loss{i}"] if i in mine(call, rank) else torch.tensor(0.0) for i in range(call["layers"])]
        values.append(torch.stack(own) * call["times"])
    values = over(values, "pp", False)
    if call["reduce"]:
        values = over(values, call["reduce"], False)
        values = over(values, "dp", True) if "dp" not in call["reduce"] else values
    if call["average"]:
        values = over(values, call["average"], True)
    return [{"out0": value} for value in values]


def _tracked(call: Call, given: list[Inputs]) -> list[Seen]:
    """The mean over the MoE layers of the logged values, times the scale; the log is empty afterwards."""
    logged = _logged(call, given)
    layers = call["layers"]
    number = {None: layers, 2: -(-layers // 2), "list": 1}[call["freq"]] + (call["mtp"] or 0)
    sums = [seen["out0"].sum() * call["scale"] / number for seen in logged]
    return [{"out0": value, "out1": torch.zeros(layers)} for value in sums]


def _scaled(call: Call, given: list[Inputs]) -> list[Seen]:
    """The output is as it was, and so is its gradient; the loss's own is the scale, whatever comes back."""

    def of(rank: int) -> Seen:
        x, loss = given[rank]["x"], given[rank]["loss"]
        scale = torch.full_like(loss, 1.0 if call["scale"] is None else call["scale"])
        return {"out0": x, "grad/x": inputs.upstream(call, rank, "out0", x), "grad/loss": scale}

    return each(call, of)


def _output(call: Call, rank: int) -> Inputs:
    return {"x": inputs.tensor(call, rank, "x", (call.rows[rank], 2)), "loss": inputs.tensor(call, rank, "loss", ())}


LOG = {
    "layers": (1, 2, 4),
    "times": (1, 2),
    "reduce": (None, "tp-cp", "tp-dp-cp", "tp"),
    "average": (None, "dp", "tp-cp"),
}
PROMISES = {
    "switch_load_balancing_loss_func": Promise(
        inputs=_probs,
        truth=local(_switch),
        arguments={**PART, "total": (1, 4, 64), "coeff": COEFF, "mask": (False, True)},
        dtypes=("float64", "float32"),  # the router's probabilities are float32 at least
        groups=("tp",),
        uneven=True,
        rounding=16.0,
    ),
    "z_loss_func": Promise(
        inputs=_logits,
        truth=local(_z),
        arguments={"experts": (2, 4, 8), "coeff": COEFF, "mask": (False, True)},
        dtypes=("float64", "float32"),
        groups=("tp",),
        rows=(1, 2, 3, 4),
        uneven=True,
        rounding=16.0,
        floor=1.0,
        single=True,
    ),
    "get_tokens_per_expert_and_token_count": Promise(
        inputs=_map,
        truth=_counts,
        arguments={**PART, "mask": (False, True)},
        dtypes=("bool",),
        groups=("tp-cp", "tp", "tp-dp-cp", "cp", "dp"),
    ),
    "get_updated_expert_bias": Promise(
        inputs=_bias,
        truth=_updated,
        arguments={"experts": (1, 2, 4, 8), "rate": (0.125, 0.5, 0.0)},
        dtypes=("float32",),
        gradients=False,
        changes=("tokens",),  # "All Reduce Across TPxCPxDP group", of a counter that its caller then sets to zero
    ),
    "reduce_aux_losses_tracker_across_ranks": Promise(
        inputs=_losses, truth=_logged, arguments=LOG, dtypes=("float32",), gradients=False, rounding=4.0
    ),
    "track_moe_metrics": Promise(
        inputs=_losses,
        truth=_tracked,
        arguments={**LOG, "scale": (1.0, 0.5), "freq": (None, 2, "list"), "mtp": (None, 1)},
        dtypes=("float32",),
        gradients=False,
        rounding=8.0,
        floor=1.0,
    ),
    "MoEAuxLossAutoScaler": Promise(
        inputs=_output, truth=_scaled, arguments={"scale": (None, 1.0, 0.25, 4.0)}, groups=("tp",)
    ),
}  # fmt: skip
