"""The strategy that draws calls. Knows Hypothesis and what functions promise; no megatron-core, no ranks.

Every call draws the same number of choices, whatever the function and the layout: what is not needed is ignored.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

from hypothesis import strategies as st

from fuzz.choices import Numbered
from fuzz.functions.call import Call
from fuzz.functions.families import promise_of
from toy_models.coordinates import groups
from toy_models.spec import Layout

# Each kind of group has every size that the world allows, next to one another and apart. Eight per world at most: to
# make the groups of a layout takes as long as many calls, and a function sees its group alone.
LAYOUTS = {
    1: (Layout(),),
    2: (
        Layout(world=2),
        Layout(world=2, tp=2),
        Layout(world=2, ep=2),
        Layout(world=2, pp=2),
        Layout(world=2, cp=2),
        Layout(world=2, tp=2, etp=2),
        Layout(world=2, tp=2, ep=2),
        Layout(world=2, cp=2, etp=2),
    ),
    4: (
        Layout(world=4, tp=2, etp=2),
        Layout(world=4, tp=4, ep=4),
        Layout(world=4, tp=2, cp=2, ep=2),
        Layout(world=4, tp=2, pp=2, ep=2),
        Layout(world=4, tp=2, ep=2, etp=2),
        Layout(world=4, cp=4, etp=4),
        Layout(world=4, pp=4),
        Layout(world=4, cp=2, pp=2, etp=2, order="tp-cp-ep-pp-dp"),
    ),
    8: (
        Layout(world=8, tp=2, cp=2, pp=2, ep=2, etp=2),
        Layout(world=8, tp=4, ep=4, etp=2),
        Layout(world=8, tp=2, pp=4, ep=2),
        Layout(world=8, cp=2, ep=8, order="cp-tp-ep-pp-dp"),
    ),
}
SEEDS, VALUES, ARGUMENTS, MOST_ROWS, OFTEN = 999, 23, 8, 8, 4


def calls(*, function: str, world: int) -> st.SearchStrategy[Call]:
    """A call of a function ("family.name"), mostly in `world` ranks, one in OFTEN times in fewer.

    Shrinks towards one rank, the first value of every argument, few rows, contiguous float64.
    """
    return _calls(function, world)


@st.composite
def _calls(draw: st.DrawFn, function: str, world: int) -> Call:
    place = Numbered(draw)
    layout, promise = _layout(place, world), promise_of(function)
    rows = [_some(promise.rows, place(1 + VALUES)) for _ in range(MOST_ROWS)]
    values = [place(1 + VALUES) for _ in range(ARGUMENTS)]
    dtype, group, contiguous = (place(1 + VALUES) for _ in range(3))
    call = Call(
        function=function,
        layout=layout,
        arguments=tuple((k, _some(of, v)) for (k, of), v in zip(promise.arguments.items(), values, strict=False)),
        dtype=_some(promise.dtypes, dtype),
        rows=tuple(rows[: layout.world] if promise.uneven else rows[:1] * layout.world),
        contiguous=_some(promise.contiguous, contiguous),
        group=_some(_groups(layout, promise.groups), group),
        seed=place(1 + SEEDS),
    )
    return promise.fit(call)


def _layout(place: Numbered, world: int) -> Layout:
    fewer = [layout for ranks, layouts in LAYOUTS.items() if ranks < world for layout in layouts]
    often, one, other = (place(1 + most) for most in (OFTEN - 1, max(1, len(fewer) - 1), VALUES))
    if fewer and not often:
        return _some(fewer, one)
    return _some(LAYOUTS[world], other)


def _some(values: Sequence[Any], place: int) -> Any:
    return values[place % len(values)]


@cache
def _groups(layout: Layout, kinds: tuple[str, ...]) -> list[str]:
    """The kinds that have several ranks, and before them one that has not."""
    alone = [kind for kind in kinds if len(groups(layout, kind)) == layout.world]
    return [*alone[:1], *(kind for kind in kinds if kind not in alone)]
