"""How often an option is on: draws that the strategies of layouts, models and whole cases share. Knows no case.

What is off is drawn too, and ignored: every case draws the same number of choices.
"""

from collections.abc import Sequence
from typing import Any

from fuzz import choices as st
from fuzz.choices import Draw
from fuzz.space import VALUES

BUSY = 3  # steps between a case with no option on and one with most of them


def count(draw: Draw, least: int, most: int) -> int:
    return least + draw(st.integers(0, most - least))


def option(draw: Draw, busy: int) -> bool:
    """Whether an option is on: never in the least busy case, three times in four in the busiest."""
    return draw(st.integers(0, BUSY)) > BUSY - busy


def switched(draw: Draw, busy: int, name: str) -> Any:
    """What a setting is when it is off, or one of its other values; two choices either way."""
    off, *on = VALUES[name]
    active, value = option(draw, busy), draw(st.sampled_from(on))
    return value if active else off


def rarely(draw: Draw, busy: int, name: str) -> Any:
    """As `switched`, for what takes much away from what the laws judge."""
    often, value = draw(st.integers(0, 2)), switched(draw, busy, name)
    return value if often == 2 else VALUES[name][0]


def any_of(draw: Draw, name: str) -> Any:
    return draw(st.sampled_from(VALUES[name]))


def one(draw: Draw, values: Sequence[Any]) -> Any:
    return draw(st.sampled_from(values))
