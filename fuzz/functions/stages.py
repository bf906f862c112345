"""What the functions promise that cut a pipeline: layers and offsets of stages, schedules, micro-batches, neighbours.

A call says the layers of a chunk; what megatron's options must be follows from that. Knows no megatron-core.
"""

from collections.abc import Callable
from typing import Any

from fuzz.functions import inputs
from fuzz.functions.call import Call
from fuzz.functions.promise import Inputs, Promise, Refused, Seen, each, with_arguments

SPLITS = ("even", "embedding", "loss", "both", "first", "last", "ends")


def layers_of(call: Call) -> list[list[int]]:
    """How many layers each chunk has, [virtual stage][stage], in the order of the model."""
    pp, vpp, per, end, split = (call[name] for name in ("pp", "vpp", "per", "end", "split"))
    counts = [[per] * pp for _ in range(vpp)]
    for chunk in counts:
        chunk[0] = end if split in ("first", "ends") else chunk[0]
        chunk[-1] = end + 1 if split in ("last", "ends") else chunk[-1]
    counts[0][0] -= split in ("embedding", "both")
    counts[-1][-1] -= split in ("loss", "both")
    return counts


def _cut(call: Call, given: list[Inputs]) -> list[Seen]:
    """Layers and first layer of every chunk: each layer of the model is in one chunk, and they follow one another."""
    counts = layers_of(call)
    offsets, first = [], 0
    for chunk in counts:
        offsets.append([first := first + n for n in [0, *chunk[:-1]]])
        first += chunk[-1]
    return [{"out0": counts, "out1": offsets}] * call.world


def _cuts(call: Call) -> Call:
    """Virtual stages need several stages, and so do two ends."""
    call = with_arguments(call, vpp=1) if call["pp"] == 1 else call
    if call["pp"] == 1 and call["split"] in ("first", "last", "ends"):
        return with_arguments(call, split="even")
    counts = [n for chunk in layers_of(call) for n in chunk]
    return call if sum(counts) > 0 <= min(counts) else with_arguments(call, split="even")  # no model has no layers


def _table(call: Call, given: list[Inputs]) -> list[Seen]:
    """Groups of micro-batches in turn, each through all chunks: (micro-batch, chunk) in the order of forward passes."""
    number, chunks, group = call["number"], call["chunks"], call["group"]
    order = sorted((m // group, c, m) for m in range(number) for c in range(chunks))
    return [{"out0": [(m, c) for _, c, m in order]}] * call.world


def _order(call: Call, given: list[Inputs]) -> list[Seen]:
    """Forward of chunk c is c + 1, backward -(c + 1), of the last chunk first; after the warm-up they alternate."""
    number, chunks, group = call["number"], call["chunks"], call["group"]
    table = _table(call, given)[0]["out0"]
    warm = min(call["warm"], len(table))
    forward = [c + 1 for _, c in table]
    backward = [-(chunks - c) for _, c in table]
    order = forward[:warm]
    waiting = list(backward)
    for step in forward[warm:]:
        order += [step, waiting.pop(0)]
    assert number and group
    return [{"out0": order + waiting}] * call.world


def _microbatches(call: Call, given: list[Inputs]) -> list[Seen]:
    """(all, whether all are warm-up, those of the warm-up, those that remain) of a stage of a pipeline.

    The warm-up is what fills the pipeline: a forward pass for each later stage; with chunks two for each, and a group
    for every chunk but the last.
    """

    def of(rank: int) -> Seen:
        stages, here, chunks = len(call.members(rank, "pp")), call.place(rank, "pp"), call["chunks"]
        chunks = chunks if stages > 1 else 1
        total = call["number"] * chunks
        warm = (stages - here - 1) * (2 if chunks > 1 else 1) + (chunks - 1) * call["group"] * (chunks > 1)
        warm = total if call["forward_only"] else warm + (call["overlap"] and chunks > 1)
        warm = warm if stages > 1 or call["forward_only"] else 0
        return {"out0": total, "out1": warm >= total, "out2": min(warm, total), "out3": total - min(warm, total)}

    return each(call, of)


def _shape(call: Call, given: list[Inputs]) -> list[Seen]:
    def of(rank: int) -> Seen:
        tp, cp = len(call.members(rank, "tp")), len(call.members(rank, "cp"))
        length = call["length"] * tp * cp
        return {"out0": [(length // cp // (tp if call["sequence_parallel"] else 1), call["micro"], 8)]}

    return each(call, of)


def _neighbours(call: Call, given: list[Inputs]) -> list[Seen]:
    def of(rank: int) -> Seen:
        them, place = call.members(rank), call.place(rank)
        last = place == len(them) - 1
        after, before = None if last else them[place + 1], None if place == 0 else them[place - 1]
        found = (place == 0, last, them[0], them[-1], after, before)
        return {f"out{i}": value for i, value in enumerate(found)}

    return each(call, of)


def _virtual(call: Call, given: list[Inputs]) -> list[Seen]:
    size, stage = call["vpp"] or 1, call["stage"]
    if stage >= size:
        raise Refused(f"stage={stage} of {size}")
    return [{"out0": stage == 0, "out1": stage == size - 1}] * call.world


def _existing(call: Call) -> Call:
    """A stage that there is, where there are several; where there is one, others must be refused."""
    return with_arguments(call, stage=call["stage"] % call["vpp"]) if (call["vpp"] or 1) > 1 else call


def _calculated(call: Call, given: list[Inputs]) -> list[Seen]:
    """(micro-batches, batch, running batch, size of a micro-batch): the running batch is what micro-batches divide."""
    micro, dp, batch = call["micro"], call["dp"], call["batch"]
    whole = batch // (micro * dp) * micro * dp
    if not whole or (whole != batch and not call["decrease"]):
        raise Refused(f"batch={batch} micro={micro} dp={dp}")
    return [{"out0": whole // (micro * dp), "out1": batch, "out2": whole, "out3": micro}] * call.world


def _ramped(call: Call, given: list[Inputs]) -> list[Seen]:
    """The batch grows by the increment each time that the same share of the ramp's samples is consumed."""
    start, batch, consumed, samples = (
        call["start"],
        call["start"] + call["grows"] * 2,
        call["consumed"],
        call["samples"],
    )
    now = batch if consumed > samples else start + 2 * int(consumed * call["grows"] / samples)
    return [{"out0": now, "out1": now}] * call.world


def _window(call: Call, given: list[Inputs]) -> list[Seen]:
    """No window, no window layers; without a frequency all are; else all but every n-th, or as the list says."""
    freq, layer = call["freq"], call["layer"]
    full = layer % freq == 0 if isinstance(freq, int) else not freq[layer - 1] if freq else False
    return [{"out0": call["window"] is not None and not full}] * call.world


def _freed(call: Call, given: list[Inputs]) -> list[Seen]:
    return [{"out0": [1] if call["free"] else [call.rows[rank], 2], "out1": True} for rank in range(call.world)]


def _activation(call: Call, rank: int) -> Inputs:
    return {"x": inputs.tensor(call, rank, "x", (call.rows[rank], 2))}


def _plain(truth: Callable[[Call, list[Inputs]], list[Seen]], **of: Any) -> Promise:
    """Of a function of plain numbers, which no tensor's layout or dtype touches."""
    return Promise(truth=truth, dtypes=("float32",), rows=(1,), contiguous=(True,), gradients=False, **of)


BATCHES = {"number": (1, 2, 3, 4, 5, 8), "chunks": (1, 2, 3), "group": (1, 2, 3, 4)}
PROMISES = {
    "layers_and_offsets": _plain(
        _cut,
        arguments={"pp": (1, 2, 3, 4), "vpp": (1, 2, 3), "per": (1, 2, 3), "end": (1, 2, 4), "split": SPLITS},
        fit=_cuts,
        groups=("tp",),
    ),
    "get_schedule_table": _plain(_table, arguments=BATCHES, groups=("tp",)),
    "convert_schedule_table_to_order": _plain(_order, arguments={**BATCHES, "warm": (0, 1, 2, 5)}, groups=("tp",)),
    "get_pp_rank_microbatches": _plain(
        _microbatches, arguments={**BATCHES, "forward_only": (False, True), "overlap": (False, True)}, groups=("pp",)
    ),
    "get_tensor_shapes": _plain(
        _shape, arguments={"length": (1, 2, 8), "micro": (1, 2), "sequence_parallel": (False, True)}
    ),
    "neighbours": _plain(_neighbours),
    "virtual_stages": _plain(
        _virtual, arguments={"vpp": (None, 1, 2, 3), "stage": (0, 1, 2)}, groups=("tp",), fit=_existing
    ),
    "ConstantNumMicroBatchesCalculator": _plain(
        _calculated,
        arguments={"batch": (1, 2, 4, 6, 12), "micro": (1, 2, 3), "dp": (1, 2), "decrease": (False, True)},
        groups=("tp",),
    ),
    "RampupBatchsizeNumMicroBatchesCalculator": _plain(
        _ramped,
        arguments={"start": (2, 4), "grows": (1, 2, 3, 0), "samples": (12, 24, 0), "consumed": (0, 1, 6, 12, 24, 99)},
        groups=("tp",),
    ),
    "is_layer_window_attention": _plain(
        _window,
        arguments={"window": (None, (4, 0)), "freq": (None, 1, 2, 3, (1, 0, 1, 0)), "layer": (1, 2, 3, 4)},
        groups=("tp",),
    ),
    "deallocate_output_tensor": Promise(
        inputs=_activation, truth=_freed, arguments={"free": (False, True)}, groups=("tp",), gradients=False
    ),
}
