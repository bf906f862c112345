"""Functions of released megatron-core that do not keep what they promise: which calls, and which law they break.

As `fuzz.known_refusals`: there is nothing to mend. Knows calls; no torch, no ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass

from fuzz.case import Violation
from fuzz.functions.call import Call
from fuzz.known import SUPPORTED, version
from toy_models.spec import Layout

VALUES = "a function gives what it promises"
INPUTS = "a function leaves its inputs alone"
CHECK = "what is refused is refused by a check"
ALIKE = "all ranks refuse alike"
LAWS = (VALUES, INPUTS, CHECK, ALIKE)


@dataclass(frozen=True)
class Known:
    """One finding: `covers` tells whether a call meets it, `laws` are what such calls break, the example the first.

    `fatal`: its calls hang or die, and are made in the example alone.
    """

    id: str
    page: str
    covers: Callable[[Call], bool]
    laws: tuple[str, ...]
    example: Call
    fatal: bool = False
    lives: tuple[str, ...] = ("0.16.1",)


TP2 = Layout(world=2, tp=2, etp=2)
REDUCED = ("mappings.reduce_from_tensor_model_parallel_region", "mappings.copy_to_tensor_model_parallel_region")
FLAT: tuple = (("cols", 2), ("dims", 2))
EMPTY = (
    "routing.topk_routing_with_score_function", "routing.group_limited_topk", "routing.router_gating_linear",
    "helpers.apply_rotary_pos_emb",
)  # fmt: skip
VIEWED = (
    "entropy.vocab_parallel_cross_entropy", "helpers.split_tensor_into_1d_equal_chunks",
    "helpers.check_param_hashes_across_dp_replicas", "routing.router_gating_linear",
)  # fmt: skip


def _shared(call: Call) -> bool:
    """Whether any rank has others in its group."""
    return any(len(call.members(rank)) > 1 for rank in range(call.world))


def _norm_of_nothing(call: Call) -> bool:
    """A norm of another kind than 2, of no gradient at all; infinity also of one without elements."""
    if call.function != "clipping.get_grad_norm_fp32" or float(call["norm_type"]) == 2:
        return False
    elements = float(call["norm_type"]) == float("inf") and (call["length"] == 0 or call["empty"])
    return min(call.rows) == 0 or elements


def _norm_of_nothing_on_some(call: Call) -> bool:
    """On some ranks alone: the others wait for them."""
    return _norm_of_nothing(call) and call.world > 1 and len(set(call.rows)) > 1


def _smoothed(call: Call) -> bool:
    return call.function == "entropy.vocab_parallel_cross_entropy" and call["smoothing"] > 0 and call.layout.tp > 1


KNOWN = (
    Known(
        id="all-reduce-of-a-copy",
        page="docs/findings/all-reduce-of-a-copy.md",
        # _reduce reduces input_.contiguous() and returns input_.
        covers=lambda call: call.function in REDUCED and not call.contiguous and _shared(call),
        laws=(VALUES,),
        example=Call(function=REDUCED[0], layout=TP2, arguments=FLAT, rows=(2, 2), contiguous=False),
    ),
    Known(
        id="all-reduce-in-place",
        page="docs/findings/all-reduce-of-a-copy.md",
        # Of a contiguous tensor the same line overwrites the argument, and the gradient that others may hold too.
        covers=lambda call: call.function in REDUCED and _shared(call),
        laws=(INPUTS,),
        example=Call(function=REDUCED[0], layout=TP2, arguments=FLAT, rows=(2, 2)),
    ),
    Known(
        id="local-tokens-are-all-tokens",
        page="docs/findings/all-reduce-of-a-copy.md",
        # The local count is read after the all-reduce has overwritten it.
        covers=lambda call: (
            call.function == "balance.get_tokens_per_expert_and_token_count" and call["mask"] and _shared(call)
        ),
        laws=(VALUES,),
        example=Call(
            function="balance.get_tokens_per_expert_and_token_count",
            layout=TP2,
            arguments=(("experts", 2), ("topk", 1), ("mask", True)),
            dtype="bool",
            rows=(4, 4),
        ),
    ),
    Known(
        id="no-tokens-of-another-width",
        page="docs/findings/functions-at-their-edges.md",
        # torch.split of no rows gives one chunk, and nothing is joined.
        covers=lambda call: call.function == "mappings.all_to_all_hp2sp" and call.rows[0] == 0 and _shared(call),
        laws=(VALUES,),
        example=Call(function="mappings.all_to_all_hp2sp", layout=TP2, arguments=FLAT, rows=(0, 0)),
    ),
    Known(
        id="minus-one-of-nothing",
        page="docs/findings/functions-at-their-edges.md",
        # view(..., -1) of a tensor without elements.
        covers=lambda call: call.function in EMPTY and min(call.rows) == 0,
        laws=(CHECK, ALIKE),
        example=Call(
            function="routing.group_limited_topk",
            arguments=(("experts", 4), ("topk", 1), ("groups", (2, 1))),
            rows=(0,),
        ),
    ),
    Known(
        id="view-of-a-transposed-tensor",
        page="docs/findings/functions-at-their-edges.md",
        covers=lambda call: call.function in VIEWED and not call.contiguous,
        laws=(CHECK,),
        example=Call(
            function=VIEWED[1], arguments=(("cols", 2), ("copied", False)), rows=(2,), contiguous=False
        ),
    ),
    Known(
        id="ramp-up-without-steps",
        page="docs/findings/functions-at-their-edges.md",
        # Divided by the number of increments, then by the samples of one.
        covers=lambda call: (
            call.function == "stages.RampupBatchsizeNumMicroBatchesCalculator" and not call["grows"] * call["samples"]
        ),
        laws=(CHECK,),
        example=Call(
            function="stages.RampupBatchsizeNumMicroBatchesCalculator",
            arguments=(("start", 2), ("grows", 0), ("samples", 12), ("consumed", 0)),
        ),
    ),
    Known(
        id="assertion-without-words",
        page="docs/findings/functions-at-their-edges.md",
        covers=lambda call: call.function == "helpers.shard_buffer" and call.rows[0] % call["parts"] > 0,
        laws=(CHECK,),
        example=Call(function="helpers.shard_buffer", arguments=(("parts", 2),), rows=(1,)),
    ),
    Known(
        id="uneven-ends-of-two-stages",
        page="docs/findings/uneven-ends-of-two-stages.md",
        covers=lambda call: (
            call.function == "stages.layers_and_offsets"
            and call["split"] == "ends"
            and call["pp"] == 2
            and call["vpp"] > 1
        ),
        laws=(CHECK,),
        example=Call(
            function="stages.layers_and_offsets",
            arguments=(("pp", 2), ("vpp", 2), ("per", 1), ("end", 1), ("split", "ends")),
        ),
    ),
    Known(
        id="tokens-dropped-at-random-places",
        page="docs/findings/tokens-dropped-at-random-places.md",
        # torch.topk among equal numbers takes any.
        covers=lambda call: call.function == "routing.apply_router_token_dropping" and call["policy"] == "position",
        laws=(VALUES,),
        example=Call(
            function="routing.apply_router_token_dropping",
            arguments=(("experts", 2), ("topk", 2), ("factor", 0.5), ("policy", "position"), ("pad", True)),
            rows=(4,),
            seed=345,
        ),
    ),
    Known(
        id="norm-of-no-gradients",
        page="docs/findings/norms-of-other-kinds.md",
        # Only the norm of kind 2 knows of an empty list.
        covers=lambda call: _norm_of_nothing(call) and not _norm_of_nothing_on_some(call),
        laws=(CHECK,),
        example=Call(
            function="clipping.get_grad_norm_fp32",
            arguments=(("length", 1), ("empty", False), ("norm_type", 1), ("single", False)),
            dtype="float32",
            rows=(0,),
        ),
    ),
    Known(
        id="norm-of-no-gradients-on-some-ranks",
        page="docs/findings/norms-of-other-kinds.md",
        covers=_norm_of_nothing_on_some,
        laws=(CHECK,),
        example=Call(
            function="clipping.get_grad_norm_fp32",
            layout=TP2,
            arguments=(("length", 1), ("empty", False), ("norm_type", 1), ("single", False)),
            dtype="float32",
            rows=(1, 0),
        ),
        fatal=True,
    ),
    Known(
        id="norm-in-bfloat16",
        page="docs/findings/norms-of-other-kinds.md",
        # torch.norm answers in the dtype of what it is given.
        covers=lambda call: (
            call.function in ("clipping.get_grad_norm_fp32", "clipping.local_multi_tensor_l2_norm")
            and call.dtype == "bfloat16"
        ),
        laws=(VALUES,),
        example=Call(
            function="clipping.get_grad_norm_fp32",
            arguments=(("length", 3), ("empty", False), ("norm_type", 2), ("single", False)),
            dtype="bfloat16",
            rows=(2,),
            seed=13,
        ),
    ),
    Known(
        id="smoothing-over-a-share",
        page="docs/findings/smoothing-over-a-share.md",
        # The size of the vocabulary and the mean of log-probabilities are those of the own share.
        covers=_smoothed,
        laws=(VALUES, CHECK),
        example=Call(
            function="entropy.vocab_parallel_cross_entropy",
            layout=TP2,
            arguments=(("vocab", 2), ("batch", 1), ("smoothing", 0.1)),
            dtype="bfloat16",
            rows=(1, 1),
        ),
    ),
    Known(
        id="logits-written-to",
        page="docs/findings/logits-written-to.md",
        # .float() of float32 is no copy, and what follows works in place.
        covers=lambda call: call.function == "entropy.vocab_parallel_cross_entropy" and call.dtype == "float32",
        laws=(INPUTS,),
        example=Call(
            function="entropy.vocab_parallel_cross_entropy",
            arguments=(("vocab", 2), ("batch", 1), ("smoothing", 0.0)),
            dtype="float32",
        ),
    ),
    Known(
        id="single-tensor-not-clipped",
        page="docs/findings/norms-of-other-kinds.md",
        # A tensor in place of a list is gone through row by row; rows have no gradient.
        covers=lambda call: (
            call.function == "clipping.clip_grad_by_total_norm_fp32" and call["single"] and 1 in call.rows
        ),
        laws=(VALUES,),
        example=Call(
            function="clipping.clip_grad_by_total_norm_fp32",
            arguments=(
                ("length", 3), ("empty", False), ("max_norm", 0.5), ("total_norm", 4.0), ("decoupled", False),
                ("single", True),
            ),
            dtype="float32",
        ),
    ),
)  # fmt: skip


def living() -> tuple[Known, ...]:
    """The findings of the installed megatron-core; of an unsupported one, those of the newest supported."""
    here = version() if version() in SUPPORTED else SUPPORTED[-1]
    return tuple(entry for entry in KNOWN if here in entry.lives)


def met(call: Call, violation: Violation) -> str:
    """The id of the living finding that a violation is; '' where it is none."""
    return next((one.id for one in living() if violation.law in one.laws and one.covers(call)), "")


def fatal(call: Call) -> str:
    """The id of the living finding of which a call would hang or die; '' where there is none."""
    return next((one.id for one in living() if one.fatal and one.covers(call)), "")
