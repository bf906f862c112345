"""What there is to draw: worlds, layouts, and the values of every setting, simplest first. Plain data.

Knows the parts of a case (`toy_models.spec`, `fuzz.case`); knows nothing of Hypothesis.
"""

import itertools
from collections.abc import Mapping, Sequence
from functools import cache
from math import prod
from typing import Any

from fuzz.case import PRECISIONS
from toy_models.spec import (
    ACTIVATIONS,
    AS_FAMILY,
    DISPATCHERS,
    DROPS,
    FAMILIES,
    FROZEN,
    GROUPS,
    MASKS,
    OPTIMIZERS,
    PIPES,
    RAGGEDNESS,
    RECOMPUTES,
    ROUTER_DTYPES,
    SCORES,
    SINKS,
    Layout,
)

WORLDS = (1, 2, 3, 4, 6, 8, 12, 16)
PROPERTIES = (1, 2, 4, 8, 16)  # worlds with a property of their own; the others are drawn now and then in larger ones
DEGREES = (1, 2, 3, 4, 6, 8, 12, 16)
PINNED = ("tp", "pp", "cp", "ep", "etp", "dp", "edp")
NAMED = (
    "ep",
    "etp",
    "tp",
    "cp",
    "pp",
)  # the degrees that make a layout of a world, in the order in which they are drawn

# Of what can be switched off, off comes first.
VALUES: dict[str, tuple[Any, ...]] = {
    "dispatcher": DISPATCHERS,
    "precision": PRECISIONS,
    "family": FAMILIES,
    "norm_topk_prob": (False, True),
    "raggedness": RAGGEDNESS,
    "holes": (False, True),
    "pad_is_eos": (False, True),
    "skew": (0.0, 4.0, 10.0, 1.0),
    "aux_loss": (0.0, 1.0, 0.3, 7.0),
    "seq_aux_loss": (0.0, 1.0, 0.3, 7.0),
    "global_aux_loss": (0.0, 1.0, 0.3, 7.0),
    "z_loss": (0.0, 0.1, 0.03, 1.0),
    "score": SCORES,
    "expert_bias": (0.0, 0.5, 0.125),
    "bias_rate": (0.0, 0.0625, 0.5),  # as the spread exact in float32
    "scaling": (1.0, 2.5, 0.4),
    "capacity": (0.0, 1.0, 0.5, 2.0, 8.0),
    "pad_to_capacity": (False, True),
    "drops": DROPS,
    "sinkhorn": (False, True),
    "activation": ACTIVATIONS,
    "gated": (True, False),
    "clamp": (0.0, 0.5, 2.0),
    "glu_offset": (0.0, 1.0, -0.25),
    "qk_norm": AS_FAMILY,
    "output_gate": (False, True),
    "sinks": SINKS,
    "biases": (False, True),
    "tied": (False, True),
    "temperature": (1.0, 0.7, 1.6),
    "gamma": (1.0, 0.9, 0.5),
    "lam": (1.0, 0.95, 0.6, 0.0),
    "kl_coef": (0.0, 0.1, 1.0),
    "clip_eps": (0.2, 0.05, 0.01),
    "value_clip": (0.2, 0.05, 0.01),
    "entropy_coef": (0.0, 0.1, 1.0),
    "whiten": (False, True),
    "optimizer": OPTIMIZERS,
    "lr": (0.1, 0.03, 0.3),
    "critic_lr": (0.1, 0.03, 0.3),
    "weight_decay": (0.0, 0.1, 1.0),
    "momentum": (0.0, 0.9, 0.5),
    "max_norm": (0.0, 0.3, 1.0, 0.05, 30.0),
    "perform_initialization": (True, False),
    "order": (
        Layout().order, "tp-cp-ep-pp-dp", "cp-tp-ep-dp-pp", "dp-ep-cp-tp-pp", "ep-tp-dp-cp-pp", "pp-dp-ep-cp-tp",
    ),
    "p2p": PIPES,
    "deallocate": (False, True),
    "forward_sp": (True, False),
    "decoder_input": (False, True),
    "padding_mask": MASKS,
    "frozen": FROZEN,
    "groups": GROUPS,
    "router_dtype": ROUTER_DTYPES,
    "distributed": (False, True),
    "overlap_reduce": (False, True),
    "overlap_gather": (False, True),
    "align": (False, True),
    "bucket": (0, 1, 50),  # of one parameter each, and of a few
    "pad_buckets": (False, True),
    "average": (False, True),
    "check_nan": (False, True),
    "count_zeros": (False, True),
    "recompute": RECOMPUTES,
    "per_token": (False, True),
    "embedding_lr": (0.0, 0.01, 0.05),
    "coupled_decay": (False, True),
    "qk_decay": (False, True),
    "qk_scaling": (False, True),
    "fp32_residual": (False, True),
    "deterministic": (False, True),
    "shared_overlap": (False, True),
}  # fmt: skip

# Adam divides by its eps: in float32 rounding of 1e-7 over an eps of 1e-8 would move a weight by the whole rate, and
# no end-to-end law could judge it. The optimizer's own law judges every eps, from the gradients that it was given.
EPSILONS = {"float64": (1e-8, 1e-4, 1e-2), "float32": (1e-3, 1e-4, 1e-2)}
ADAM = 0.3  # its rates, as a share of those of SGD


def values_of(name: str, optimizer: str, precision: str) -> tuple[Any, ...]:
    """The values of a setting, simplest first; none where it has no effect."""
    adam = optimizer == "adam"
    if name == "eps":
        return EPSILONS[precision] if adam else ()
    if (name == "momentum" and adam) or (name == "coupled_decay" and not adam):
        return ()
    return rates(optimizer) if name in ("lr", "critic_lr") else VALUES[name]


def rates(optimizer: str) -> tuple[float, ...]:
    """The learning rates of an optimizer."""
    return tuple(rate * (ADAM if optimizer == "adam" else 1.0) for rate in VALUES["lr"])


def reducing(optimizer: str, balanced: bool, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """How gradients are reduced: of what is drawn all that goes together, the rest off.

    Padding is 2**16 numbers per bucket, so one for each parameter would be sent for seconds.
    """
    distributed, overlap = drawn["distributed"] and optimizer == "adam", drawn["overlap_reduce"]
    bucket, per_token = drawn["bucket"] if overlap else 0, drawn["per_token"] and not balanced
    return {
        "distributed": distributed,
        "overlap_reduce": overlap,
        "overlap_gather": drawn["overlap_gather"] and distributed and overlap,
        "align": drawn["align"] and overlap,
        "bucket": bucket,
        "pad_buckets": drawn["pad_buckets"] and distributed and not bucket,
        "per_token": per_token,
        "average": drawn["average"] and not per_token,
        **{name: drawn[name] for name in ("check_nan", "count_zeros")},
    }


REDUCTION = (
    "distributed", "overlap_reduce", "overlap_gather", "align", "pad_buckets", "average", "check_nan", "count_zeros",
    "per_token",
)  # fmt: skip


def recomputing(recompute: str, layers: int) -> dict[str, Any]:
    """What is recomputed, of how many layers where it is full."""
    return {"recompute": recompute, "recompute_layers": max(1, layers) if recompute in ("uniform", "block") else 0}


def worlds(max_ranks: int) -> list[int]:
    """The world sizes that are drawn, at most `max_ranks`."""
    return [world for world in WORLDS if world <= max_ranks]


def first_in(world: int) -> list[int]:
    """The worlds that a property of this world is the first to have room for."""
    before = max((size for size in PROPERTIES if size < world), default=0)
    return [size for size in WORLDS if before < size <= world]


def worlds_below(world: int) -> list[int]:
    """Smaller worlds, few, so that they are drawn now and then only: those with properties, and the largest other."""
    below = worlds(world - 1)
    others = [size for size in below if size not in PROPERTIES]
    return [size for size in below if size in (*PROPERTIES, *others[-1:])]


@cache
def all_layouts(world: int) -> tuple[Layout, ...]:
    """Every layout of a world, simplest first: few degrees above one, small, EP before TP; without virtual stages."""
    degrees = [degree for degree in range(1, world + 1) if world % degree == 0]
    places: list[dict[str, Any]] = [
        dict(zip(NAMED, x, strict=True)) for x in itertools.product(degrees, repeat=len(NAMED))
    ]
    fits = [p for p in places if world % (p["tp"] * p["cp"] * p["pp"]) == world % (p["ep"] * p["etp"] * p["pp"]) == 0]
    return tuple(sorted((Layout(world=world, **place) for place in fits), key=complexity))


def complexity(layout: Layout) -> tuple:
    """Orders the layouts of one world."""
    degrees = tuple(getattr(layout, name) for name in NAMED)
    return sum(degree > 1 for degree in degrees), prod(degrees), tuple(-degree for degree in degrees)


def schedules(pp: int) -> list[tuple[int, int]]:
    """Micro-batches and the group in which the interleaved schedule of `pp` stages takes them, fewest first."""
    numbers = range(pp, pp + 4)
    return [(m, g) for m in numbers for g in range(pp, m + 1) if m % g == 0 or m % g >= pp]


def fitting(tried: Sequence[int], pins: dict[str, int]) -> dict[int, list[Layout]]:
    """The layouts that have the pinned degrees, by world; ValueError where there is none."""
    unknown = sorted(set(pins) - set(PINNED))
    if unknown:
        raise ValueError(f"cannot pin {', '.join(unknown)}; layouts can be pinned by world, {', '.join(PINNED)}")
    found = {world: fits for world in tried if (fits := _fitting(world, pins))}
    if not found:
        raise ValueError(_nothing_fits(tried, pins))
    return found


def _fitting(world: int, pins: dict[str, int]) -> list[Layout]:
    return _having(world, tuple(pins.items()))


@cache
def _having(world: int, pins: tuple[tuple[str, int], ...]) -> list[Layout]:
    return [x for x in all_layouts(world) if all(getattr(x, name) == value for name, value in pins)]


def _nothing_fits(tried: Sequence[int], pins: dict[str, int]) -> str:
    """What was asked, and what each pin could be: with the others as they are where there is such a value."""
    asked = ", ".join(f"{name}={value}" for name, value in pins.items())
    others = {name: {key: value for key, value in pins.items() if key != name} for name in pins}
    degrees = {name: _possible(tried, name, rest) or _possible(tried, name, {}) for name, rest in others.items()}
    possible = "; ".join(f"{name} can be {', '.join(map(str, values))}" for name, values in degrees.items())
    return f"no layout of world={' or '.join(map(str, tried))} has {asked}; {possible}"


def _possible(tried: Sequence[int], name: str, pins: dict[str, int]) -> list[int]:
    return sorted({getattr(layout, name) for world in tried for layout in _fitting(world, pins)})
