"""What the vocabulary-parallel cross entropy promises: the loss over the whole vocabulary. No megatron-core."""

import torch

from fuzz.functions import inputs
from fuzz.functions.call import Call
from fuzz.functions.promise import Inputs, Promise, Seen, with_arguments

SHAPES = {"vocab": (2, 1, 3, 4), "batch": (1, 2)}


def _logits(call: Call, rank: int) -> Inputs:
    """logits [sequence, batch, vocab/TP]; the target is the same on all ranks of TP."""
    rows, size = call.rows[0], len(call.members(rank))
    first = call.members(rank)[0]
    shape = (rows, call["batch"])
    return {
        "logits": inputs.tensor(call, rank, "logits", (*shape, call["vocab"])),
        "target": inputs.integers(call, first, "target", shape, 0, call["vocab"] * size - 1),
    }


def _loss(call: Call, given: list[Inputs]) -> list[Seen]:
    """(1 - s·K/(K-1)) · CE + s·K/(K-1) · mean over the whole vocabulary of -log p, K its size; float32."""
    seen: list[Seen] = [{} for _ in range(call.world)]
    for rank in range(call.world):
        them, place = call.members(rank), call.place(rank)
        parts = [given[member]["logits"].double().clone().requires_grad_() for member in them]
        logs, target = torch.log_softmax(torch.cat(parts, -1), -1), given[rank]["target"]
        loss = -logs.gather(-1, target[..., None])[..., 0]
        if call["smoothing"]:
            size = logs.shape[-1]
            share = call["smoothing"] * size / (size - 1)
            loss = (1 - share) * loss - share * logs.mean(-1)
        out = loss.detach().float()
        loss.backward(inputs.upstream(call, rank, "out0", out).double())
        seen[rank] = {"out0": out, "grad/logits": parts[place].grad.to(given[rank]["logits"].dtype)}  # type: ignore[union-attr]
    return seen


def _smooth_over_several(call: Call) -> Call:
    """A vocabulary of one token has no other that could get a share."""
    whole = call["vocab"] * len(call.members(0))
    return call if whole > 1 else with_arguments(call, smoothing=0.0)


def _max(call: Call, given: list[Inputs]) -> list[Seen]:
    found = [given[rank]["logits"].float() for rank in range(call.world)]
    return [{"out0": x, "out1": torch.stack([row.max() for row in x.reshape(-1, x.shape[-1])]).reshape(x.shape[:2])
             if x.shape[0] else x.new_empty(x.shape[:2])} for x in found]  # fmt: skip


def _start(call: Call, given: list[Inputs]) -> list[Seen]:
    """[first, last) of a rank's share of the vocabulary, from the size of a share and from that of the whole."""

    def of(place: int, size: int) -> tuple[int, int]:
        return place * call["vocab"], place * call["vocab"] + call["vocab"]

    return [{"out0": (own := list(of(call.place(r), len(call.members(r))))), "out1": own} for r in range(call.world)]


def _targets(call: Call, given: list[Inputs]) -> list[Seen]:
    """The maximum's distance, the mask of targets elsewhere, the predicted logit, the sum of exponentials."""
    seen = []
    for rank in range(call.world):
        x, target, first = given[rank]["logits"].double(), given[rank]["target"], call.place(rank) * call["vocab"]
        shifted = x - x.amax(-1, keepdim=True) if x.numel() else x
        elsewhere = (target < first) | (target >= first + call["vocab"])
        own = (target - first).where(~elsewhere, torch.zeros_like(target))
        at = shifted.gather(-1, own[..., None])[..., 0].where(~elsewhere, torch.zeros(()).double())
        tensors = [elsewhere, own.flatten(), at.float(), shifted.exp().sum(-1).float(), shifted.exp().float()]
        seen.append({f"out{i}": tensor for i, tensor in enumerate(tensors)})
    return seen


PROMISES = {
    "vocab_parallel_cross_entropy": Promise(
        inputs=_logits,
        truth=_loss,
        arguments={**SHAPES, "smoothing": (0.0, 0.1, 0.5)},
        groups=("tp",),
        rounding=16.0,
        floor=4.0,
        single=True,
        fit=_smooth_over_several,
    ),
    "calculate_logits_max": Promise(inputs=_logits, truth=_max, arguments=SHAPES, groups=("tp",), gradients=False),
    "calculate_predicted_logits": Promise(
        inputs=_logits,
        truth=_targets,
        arguments=SHAPES,
        dtypes=("float32", "bfloat16"),
        groups=("tp",),
        gradients=False,
        rounding=8.0,
        contiguous=(True,),
    ),
    "VocabUtility": Promise(truth=_start, arguments=SHAPES, dtypes=("float32",), gradients=False),
}
