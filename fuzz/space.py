"""What there is to draw: worlds, layouts, and the values of every setting, simplest first. Plain data.

Knows the parts of a case (`toy_models.spec`, `fuzz.case`); knows nothing of Hypothesis.
"""

import itertools
from collections.abc import Sequence
from functools import cache
from typing import Any

from fuzz.case import PRECISIONS
from toy_models.spec import DISPATCHERS, FAMILIES, OPTIMIZERS, RAGGEDNESS, Layout

WORLDS = (1, 2, 4, 8)
DEGREES = (1, 2, 4, 8)
PINNED = ("tp", "ep", "etp", "dp", "edp")

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
    "z_loss": (0.0, 0.1, 0.03, 1.0),
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
}

# Adam divides by its eps: in float32 rounding of 1e-7 over an eps of 1e-8 would move a weight by the whole rate, and
# no end-to-end law could judge it. The optimizer's own law judges every eps, from the gradients that it was given.
EPSILONS = {"float64": (1e-8, 1e-4, 1e-2), "float32": (1e-3, 1e-4, 1e-2)}
ADAM = 0.3  # its rates, as a share of those of SGD


def values_of(name: str, optimizer: str, precision: str) -> tuple[Any, ...]:
    """The values of a setting, simplest first; none where it has no effect."""
    adam = optimizer == "adam"
    if name == "eps":
        return EPSILONS[precision] if adam else ()
    if name == "momentum" and adam:
        return ()
    return rates(optimizer) if name in ("lr", "critic_lr") else VALUES[name]


def rates(optimizer: str) -> tuple[float, ...]:
    """The learning rates of an optimizer."""
    return tuple(rate * (ADAM if optimizer == "adam" else 1.0) for rate in VALUES["lr"])


def worlds(max_ranks: int) -> list[int]:
    """The world sizes that are drawn, at most `max_ranks`."""
    return [world for world in WORLDS if world <= max_ranks]


@cache
def all_layouts(world: int) -> tuple[Layout, ...]:
    """Every layout of a world with power-of-two degrees, simplest first: few degrees above one, small, EP before TP."""
    places = [x for x in itertools.product(DEGREES, repeat=3) if world % (x[0] * x[1]) == world % x[2] == 0]
    return tuple(sorted((Layout(world=world, ep=ep, etp=etp, tp=tp) for ep, etp, tp in places), key=complexity))


def complexity(layout: Layout) -> tuple:
    """Orders the layouts of one world."""
    degrees = (layout.ep, layout.etp, layout.tp)
    return sum(degree > 1 for degree in degrees), layout.ep * layout.etp * layout.tp, degrees


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
    return [x for x in all_layouts(world) if all(getattr(x, name) == value for name, value in pins.items())]


def _nothing_fits(tried: Sequence[int], pins: dict[str, int]) -> str:
    """What was asked, and what each pin could be: with the others as they are where there is such a value."""
    asked = ", ".join(f"{name}={value}" for name, value in pins.items())
    others = {name: {key: value for key, value in pins.items() if key != name} for name in pins}
    degrees = {name: _possible(tried, name, rest) or _possible(tried, name, {}) for name, rest in others.items()}
    possible = "; ".join(f"{name} can be {', '.join(map(str, values))}" for name, values in degrees.items())
    return f"no layout of world={' or '.join(map(str, tried))} has {asked}; {possible}"


def _possible(tried: Sequence[int], name: str, pins: dict[str, int]) -> list[int]:
    return sorted({getattr(layout, name) for world in tried for layout in _fitting(world, pins)})
