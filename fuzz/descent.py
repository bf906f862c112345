"""From a failing case to smaller ones that may fail alike: settings put back, degrees and sizes lowered, boldest first.

Hypothesis shrinks one choice after another, and a case costs seconds; these are the steps that a person would try
first. Knows cases, their order and how to fit one; runs nothing.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any

from fuzz.case import Case
from fuzz.neighbours import PARTS, SIZES, fitted, flat, neighbours
from fuzz.order import size
from fuzz.space import NAMED, all_layouts, complexity, worlds
from toy_models.spec import Layout

LEAST: Mapping[str, Any] = flat(Case())
PLACES = ("world", *NAMED)


def smaller(case: Case) -> Iterator[Case]:
    """Simpler cases to try in place of this one, the boldest first."""
    for other in (*_plain(case), *_placed(case), *_single(case)):
        if other is not None and size(other) < size(case):
            yield other


def smallest(case: Case, fails: Callable[[Case], bool | None]) -> Case:
    """The last of a chain of cases that fail, each simpler than the one before; `fails` is None when time is up."""
    here = _down(case, fails)
    while (other := _first(_elsewhere(case, here), fails)) is not None:
        here = _down(other, fails)
    return here


def _down(case: Case, fails: Callable[[Case], bool | None]) -> Case:
    while (other := _first(smaller(case), fails)) is not None:
        case = other
    return case


def _first(tried: Iterator[Case], fails: Callable[[Case], bool | None]) -> Case | None:
    """The first that fails; None where none does, or time is up."""
    for other in tried:
        found = fails(other)
        if found is not False:
            return other if found else None
    return None


def _elsewhere(first: Case, here: Case) -> Iterator[Case]:
    """On every simpler layout, the simplest first: what was reached; then the same with as many rows in all, or as many
    experts on each rank; then what it began with, and other seeds. Where what is small holds, what is large may fail.
    """
    layouts = list(_simpler(here))
    of = {layout: {name: getattr(layout, name) for name in PLACES} for layout in layouts}
    tried = [fitted(here, **of[layout]) for layout in layouts]
    tried += [fitted(here, **of[layout], micro_batches=_all_rows(here, layout)) for layout in layouts]
    tried += [fitted(here, **of[layout], experts=_all_experts(here, layout)) for layout in layouts]
    tried += [fitted(first, **of[layout]) for layout in layouts]
    tried += [fitted(here, **of[layout], seed=here.seed + more) for layout in layouts for more in (1, 2)]
    yield from (other for other in dict.fromkeys(tried) if other is not None and _place(other) < _place(here))


def _simpler(case: Case) -> Iterator[Layout]:
    """Layouts of no more ranks that are simpler, with no more degrees above one."""
    for layout in (layout for world in worlds(case.layout.world) for layout in all_layouts(world)):
        few = complexity(layout)[0] <= complexity(case.layout)[0]
        if few and (layout.world, complexity(layout)) < _place(case):
            yield layout


def _all_rows(case: Case, layout: Layout) -> int:
    """In how many micro-batches a replica of this layout takes the rows of a case."""
    return max(1, case.batch.rows // (case.ppo.mini_batches * case.batch.micro_rows * layout.dp))


def _all_experts(case: Case, layout: Layout) -> int:
    """How many experts there are where each rank of this layout has as many as in a case."""
    return case.model.experts // case.layout.ep * layout.ep


def _place(case: Case) -> tuple:
    return case.layout.world, complexity(case.layout)


def _plain(case: Case) -> Iterator[Case | None]:
    """All that is no layout at its least; then part by part."""
    of_part = {part: set(vars(getattr(case, part))) for part in PARTS if part != "layout"}
    everything = set().union(*of_part.values(), {"micro_batches", "precision", "seed"})
    for fields in (everything, set(SIZES.values()) & everything, *of_part.values()):
        yield fitted(case, **{field: LEAST[field] for field in fields if field in LEAST})
    yield fitted(case, order=Layout().order, split="even", stages=(), vpp=1)
    yield replace(case, twin=None)


def _placed(case: Case) -> Iterator[Case | None]:
    """The fewest ranks that have some of the degrees, each at 2, and perhaps two data-parallel replicas."""
    high = [name for name in NAMED if getattr(case.layout, name) > 1]
    kept = (some for number in range(len(high) + 1) for some in combinations(high, number))
    for some in kept:
        for replicas in (1, 2):
            degrees = {name: 2 if name in some else 1 for name in NAMED}
            dense, expert = (degrees[a] * degrees[b] for a, b in (("tp", "cp"), ("ep", "etp")))
            yield fitted(case, **degrees, world=max(dense, expert) * degrees["pp"] * replicas)


def _single(case: Case) -> Iterator[Case | None]:
    """One setting or size at its least, then one step lower."""
    here = flat(case)
    for field, least in LEAST.items():
        if field not in PLACES and here[field] != least:
            yield fitted(case, **{field: least})
    yield from (fitted(case, seed=seed) for seed in range(1, min(4, case.seed)))
    yield from (each.case for each in neighbours(case) if each.direction == "down")
