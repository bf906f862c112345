"""Strategies that draw layouts, and how a pipeline is cut. Knows Hypothesis and what layouts there are; no model."""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hypothesis.strategies import SearchStrategy, composite

from fuzz import choices as st
from fuzz.choices import Draw
from fuzz.draws import count, option, switched
from fuzz.space import DEGREES, NAMED, fitting, worlds, worlds_below
from toy_models.spec import SPLITS, Layout

MOST_STAGES = 8  # with virtual ones; of more than half as many each has one layer
# Before anything else Hypothesis goes once through all choices that are drawn from 0 on and lie below this, first to
# last, puts each to 0, and tries the smaller values of those that others hang on. So a failure goes to a smaller world,
# layout and model while most of its budget is left; later passes begin with the last choice.
ALTERNATIVES = st.ALTERNATIVES


def layouts(
    *, max_ranks: int = 4, world: int | None = None, mostly: int | None = None, **degrees: int | None
) -> SearchStrategy[Layout]:
    """Layouts of 1 to `max_ranks` ranks; `tp`, `pp`, `cp`, `ep`, `etp`, `dp`, `edp` pin. ValueError where none fits.

    Shrinks towards one rank, and within a world towards small degrees. Within a world all are equally likely. `world`
    pins; `mostly` draws that world, and smaller ones now and then, so that a failure can shrink below it.
    """
    return _layouts(worlds_to_draw(max_ranks, world, mostly, degrees), pinned(degrees))


def pinned(degrees: Mapping[str, int | None]) -> dict[str, int]:
    return {name: degree for name, degree in degrees.items() if degree is not None}


def worlds_to_draw(
    max_ranks: int, world: int | None, mostly: int | None, degrees: Mapping[str, int | None]
) -> list[int]:
    """The worlds to choose from, each as often as it shall count."""
    pins = pinned(degrees)
    if max_ranks < 1:
        raise ValueError(f"max_ranks={max_ranks} must be at least 1")
    if world is not None and mostly is not None:
        raise ValueError(f"world={world} is drawn always, mostly={mostly} in most cases; use one of them")
    usual = world if mostly is None else mostly
    found = list(fitting(worlds(max_ranks) if usual is None else [usual], pins))
    if mostly is None:
        # Larger worlds have more layouts: each counts as often as its place in the list.
        return [size for place, size in enumerate(found, 1) for _ in range(place)]
    smaller = list(fitting([*worlds_below(mostly), mostly], pins))
    return [*smaller, *[mostly] * (ALTERNATIVES - len(smaller))]


@composite
def _layouts(draw: Callable[[SearchStrategy], Any], bag: Sequence[int], pins: dict[str, int]) -> Layout:
    return draw_layout(st.drawn(draw), bag, pins)


def draw_layout(draw: Draw, bag: Sequence[int], pins: dict[str, int]) -> Layout:
    # (`integers`, as `sampled_from` makes no choice where there is one value.)
    world = bag[draw(st.integers(0, len(bag) - 1))]
    draw(st.integers(world, world))  # what follows hangs on the world: seen by its bounds, so that 2 is tried after 1
    left = fitting([world], pins)[world]
    # Degree by degree: an index into the whole list stays where the next smaller ones happen to pass.
    for name in NAMED:
        degree = _degree(draw, [getattr(layout, name) for layout in left])
        left = [layout for layout in left if getattr(layout, name) == degree]
    return left[0]


def _degree(draw: Draw, degrees: Sequence[int]) -> int:
    """One of `degrees`, all equally likely.

    The first choice names it, and goes on naming it when the world shrinks; the second, at 0 in every shrunk case,
    evens out how often each is named.
    """
    named = [max((d for d in degrees if d <= name), default=min(degrees)) for name in DEGREES]
    others = sorted((Counter(list(degrees) * len(named)) - Counter(named)).elements())
    name, even = draw(st.integers(0, len(named) - 1)), draw(st.integers(0, len(degrees) - 1))
    return others[len(named) * (even - 1) + name] if even else named[name]


def draw_pipeline(draw: Draw, busy: int, layout: Layout, per_stage: int) -> tuple[Layout, int]:
    """The layout with its order, virtual stages and cut, and the layers in all. Shrinks towards an even cut."""
    order, virtual = switched(draw, busy, "order"), 1 + (layout.pp > 1) * option(draw, busy) * count(draw, 1, 2)
    split, uneven, seed = draw(st.sampled_from(SPLITS[1:])), option(draw, busy), draw(st.integers(0, 255))
    order = order if order.endswith("-pp") or layout.pp == 1 or layout.dp == layout.edp else layout.order
    virtual = min(virtual, max(1, MOST_STAGES // layout.pp))
    number = layout.pp * virtual
    per_stage = per_stage if number <= MOST_STAGES // 2 else 1
    if layout.pp == 1 or not uneven:
        return replace(layout, order=order, vpp=virtual), per_stage * number
    counts = _stages(split, layout.pp, virtual, per_stage, seed)
    return replace(layout, order=order, vpp=virtual, split=split, stages=counts), sum(counts)


def _stages(split: str, pp: int, vpp: int, layers: int, seed: int) -> tuple[int, ...]:
    """Layers of each stage that an option of megatron gives; `seed` says which of the ways."""
    counts, first, last = [layers] * (pp * vpp), 1 + seed % 3, 1 + seed // 3 % 3
    if split == "ends":
        return tuple(((first, *[layers] * (pp - 2), last)) * vpp)
    if split == "list":
        drawn = random.Random(seed)
        counts = [drawn.choice((0, 1, 1, 2)) for _ in counts]
        return tuple(counts if any(counts) else [1, *counts[1:]])
    counts[0] -= split in ("embedding", "both")
    counts[-1] -= split in ("loss", "both")
    return tuple(counts) if any(counts) else tuple(count + 1 for count in counts)
