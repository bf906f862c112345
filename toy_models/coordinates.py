"""Where ranks and layers sit: coordinates, groups and stages of a layout, by megatron's documented order.

`Layout.order` names the axes, the first fastest. Dense weights see the axes tp, cp, dp, pp, expert weights etp, ep,
edp, pp, each in that order; a group of some axes has the ranks that agree on all others of its side. The stages of a
pipeline go around the ranks once per virtual stage. Stdlib only; knows no process group.
"""

from functools import cache
from typing import NamedTuple

from toy_models.spec import Layout


class Coordinates(NamedTuple):
    """Where a rank sits on each axis."""

    tp: int
    cp: int
    dp: int
    pp: int
    etp: int
    ep: int
    edp: int


DENSE, EXPERT = ("tp", "cp", "dp", "pp"), ("etp", "ep", "edp", "pp")
GROUPS = (
    "tp", "cp", "dp", "dp-cp", "tp-cp", "tp-dp", "tp-dp-cp", "pp", "tp-pp", "etp", "ep", "etp-ep", "etp-ep-pp", "edp",
)  # fmt: skip


@cache
def coordinates(layout: Layout, rank: int) -> Coordinates:
    """An independent formula for what `parallel_state.initialize_model_parallel` must give this rank."""
    dense = {"tp": layout.tp, "cp": layout.cp, "ep": 1, "dp": layout.dp, "pp": layout.pp}
    expert = {"tp": layout.etp, "cp": 1, "ep": layout.ep, "dp": layout.edp, "pp": layout.pp}
    here, there = _places(layout.order, dense, rank), _places(layout.order, expert, rank)
    return Coordinates(
        tp=here["tp"], cp=here["cp"], dp=here["dp"], pp=here["pp"], etp=there["tp"], ep=there["ep"], edp=there["dp"]
    )


def _places(order: str, sizes: dict[str, int], rank: int) -> dict[str, int]:
    places = {}
    for axis in order.split("-"):
        rank, places[axis] = divmod(rank, sizes[axis])
    return places


def stages(layout: Layout, layers: int) -> tuple[int, ...]:
    """How many layers each stage of the pipeline has, in the order of the model."""
    number = layout.pp * layout.vpp
    return layout.stages or (layers // number,) * number


@cache
def chunks(layout: Layout, layers: int, rank: int) -> tuple[tuple[int, ...], ...]:
    """The layers (indices from 0) of each virtual stage of a rank."""
    counts, here = stages(layout, layers), coordinates(layout, rank).pp
    first = [sum(counts[:stage]) for stage in range(here, len(counts), layout.pp)]
    return tuple(tuple(range(at, at + counts[here + i * layout.pp])) for i, at in enumerate(first))


def layers_on(layout: Layout, layers: int, rank: int) -> tuple[int, ...]:
    """All layers of a rank."""
    return tuple(layer for chunk in chunks(layout, layers, rank) for layer in chunk)


def is_first(layout: Layout, rank: int) -> bool:
    """Whether the rank has the embedding."""
    return coordinates(layout, rank).pp == 0


def is_last(layout: Layout, rank: int) -> bool:
    """Whether the rank has the head and sees the loss."""
    return coordinates(layout, rank).pp == layout.pp - 1


def groups(layout: Layout, kind: str) -> list[list[int]]:
    """The process groups of a kind (one of GROUPS), in the order of their first ranks: a partition of the world."""
    axes = kind.split("-")
    side = DENSE if set(axes) <= set(DENSE) else EXPERT
    found: dict[tuple[int, ...], list[int]] = {}
    for rank in range(layout.world):
        place = coordinates(layout, rank)
        found.setdefault(tuple(getattr(place, axis) for axis in side if axis not in axes), []).append(rank)
    return list(found.values())
