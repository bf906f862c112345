"""What activations, residual additions and masks of scores promise. Knows no megatron-core."""

import math

import torch
from torch import Tensor

from fuzz.functions import inputs
from fuzz.functions.call import Call
from fuzz.functions.promise import COLS, HERE, Inputs, Promise, Seen, each, local


def _masked_inputs(call: Call, rank: int) -> Inputs:
    return {
        **inputs.matrix(call, rank),
        "mask": inputs.tensor(call, rank, "mask", (call.rows[rank], call["cols"]), "bool"),
    }


def _masked(call: Call, given: list[Inputs]) -> list[Seen]:
    def of(rank: int) -> Seen:
        x, mask = given[rank]["x"], given[rank]["mask"]
        return {"out0": torch.where(mask, torch.full_like(x, -10000.0), x)}

    return each(call, of)


def _tanh_gelu(call: Call, rank: int, x: Tensor) -> tuple:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))), inputs.dtype_of(call.dtype)


def _gelu(call: Call, rank: int, x: Tensor) -> tuple:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2))), inputs.dtype_of(call.dtype)


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
    return out if weights is None else out * weights, inputs.dtype_of(call.dtype)


def _added_inputs(call: Call, rank: int) -> Inputs:
    found = {
        **inputs.matrix(call, rank),
        "residual": inputs.tensor(call, rank, "residual", (call.rows[rank], call["cols"])),
    }
    return {**found, "bias": inputs.tensor(call, rank, "bias", (call["cols"],))} if call["bias"] else found


def _residual(call: Call, rank: int, x: Tensor, residual: Tensor, bias: Tensor | None = None) -> tuple:
    return residual + (x if bias is None else x + bias), inputs.dtype_of(call.dtype)


def _three(call: Call, rank: int) -> Inputs:
    shape = call.rows[0], 2, call["cols"]
    return {name: inputs.tensor(call, rank, name, shape) for name in ("grad_output", "total")}


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


PROMISES = {
    "attention_mask_func": Promise(
        inputs=_masked_inputs, truth=_masked, arguments=COLS, groups=HERE, uneven=True, gradients=False, changes=("x",)
    ),
    "gelu_impl": Promise(
        inputs=inputs.matrix, truth=local(_tanh_gelu), arguments=COLS, groups=HERE, uneven=True, rounding=16.0,
        floor=4.0,
    ),
    "erf_gelu": Promise(
        inputs=inputs.matrix, truth=local(_gelu), arguments=COLS, groups=HERE, uneven=True, rounding=64.0, floor=4.0,
        single=True,  # its root of two has six digits
    ),
    "bias_swiglu_impl": Promise(
        inputs=_halves, truth=local(_swiglu), arguments={**COLS, "bias": (False, True)}, groups=HERE, uneven=True,
        rounding=16.0, floor=8.0,
    ),
    "weighted_bias_swiglu_impl": Promise(
        inputs=_halves, truth=local(_swiglu), arguments={**COLS, "weights": (True,)}, groups=HERE, uneven=True,
        rounding=16.0, floor=8.0, coarse=True,
    ),
    "bias_dropout_add": Promise(
        inputs=_added_inputs, truth=local(_residual), groups=HERE, uneven=True,
        arguments={**COLS, "bias": (False, True), "training": (True, False), "fused": (False, True)},
        rounding=2.0,
    ),
    "prepare_input_tensors_for_wgrad_compute": Promise(
        inputs=_three, truth=_wgrad, arguments=COLS, groups=HERE, gradients=False
    ),
}  # fmt: skip
