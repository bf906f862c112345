"""Where ranks sit: coordinates and groups of a layout, computed from megatron's documented order. Stdlib only.

The order is tp-cp-ep-dp-pp, the first fastest. Dense weights see the axes tp, cp, dp, pp, expert weights etp, ep, edp,
pp; a group of some axes has the ranks that agree on all others of its side. Knows no process group.
"""

from functools import cache
from typing import NamedTuple

from toy_models.spec import Layout


class Coordinates(NamedTuple):
    """Where a rank sits on each axis, by megatron's default order tp-cp-ep-dp-pp (tp fastest)."""

    tp: int
    cp: int
    dp: int
    pp: int
    etp: int
    ep: int
    edp: int


DENSE, EXPERT = ("tp", "cp", "dp", "pp"), ("etp", "ep", "edp", "pp")
GROUPS = ("tp", "cp", "dp", "dp-cp", "tp-cp", "pp", "etp", "ep", "etp-ep", "edp")


@cache
def coordinates(layout: Layout, rank: int) -> Coordinates:
    """An independent formula for what `parallel_state.initialize_model_parallel` must give this rank."""
    stage, inner = divmod(rank, layout.world // layout.pp)
    rest, tp = divmod(inner, layout.tp)
    dp, cp = divmod(rest, layout.cp)
    rest, etp = divmod(inner, layout.etp)
    edp, ep = divmod(rest, layout.ep)
    return Coordinates(tp=tp, cp=cp, dp=dp, pp=stage, etp=etp, ep=ep, edp=edp)


def groups(layout: Layout, kind: str) -> list[list[int]]:
    """The process groups of a kind (one of GROUPS), in the order of their first ranks: a partition of the world."""
    axes = kind.split("-")
    side = DENSE if set(axes) <= set(DENSE) else EXPERT
    found: dict[tuple[int, ...], list[int]] = {}
    for rank in range(layout.world):
        place = coordinates(layout, rank)
        found.setdefault(tuple(getattr(place, axis) for axis in side if axis not in axes), []).append(rank)
    return list(found.values())
