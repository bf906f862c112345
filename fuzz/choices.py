"""One choice among values, the simplest first, and who makes it: Hypothesis, a script, or Hypothesis below a script.

A script is the places of all choices of one case, in the order in which they are made. Knows nothing of cases.
"""

import random
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, NamedTuple

from hypothesis import strategies as st

Script = tuple[int, ...]
Draw = Callable[["Choice"], Any]

# A choice below a script is at its place at least so many times in so many; more would be more than Hypothesis takes
# for an alternative, which it lowers before anything else.
ALTERNATIVES = 11
LIKELY = 4

WIDEST = 2**20  # values of one choice


class Choice(NamedTuple):
    """One of `values` is chosen."""

    values: Sequence[Any]

    @property
    def alone(self) -> int:
        """The only value, where it is an int."""
        return self.values[0] if isinstance(self.values, range) else 0


def integers(least: int, most: int) -> Choice:
    """An int of `least` to `most`."""
    return Choice(range(least, most + 1))


def sampled_from(values: Sequence[Any]) -> Choice:
    """One of at least two values (Hypothesis makes no choice where there is one)."""
    return Choice(values)


def booleans() -> Choice:
    """False, or True."""
    return Choice((False, True))


class Numbered:
    """Places from Hypothesis, each choice among numbers that no other choice of the case has.

    Hypothesis copies what was drawn by one strategy to where an equal one was drawn, five times for each case drawn
    anew, as equal arguments are a good idea where lists are sorted. Here a learning rate would be copied to the number
    of heads: four cases in five were the one before it but for one setting, or for none. Ranges that differ are
    strategies that differ, and nothing is copied.
    """

    def __init__(self, draw: Callable[[st.SearchStrategy], Any]) -> None:
        self._draw, self._made = draw, count()

    def __call__(self, number: int, alone: int = 0) -> int:
        """A place below `number`; shrinks towards 0. Where there is one place the choice is that of `alone`."""
        first = next(self._made) * WIDEST
        if number == 1:  # a choice all the same, which `sampled_from` would not make
            return int(self._draw(st.integers(alone, alone))) - alone
        return int(self._draw(st.sampled_from(range(first, first + number)))) - first


def drawn(draw: Callable[[st.SearchStrategy], Any]) -> Draw:
    """Hypothesis chooses."""
    place = Numbered(draw)
    return lambda choice: choice.values[place(len(choice.values), choice.alone)]


class Scripted:
    """A script chooses, and where it ends, chance; `script` is the whole, `sizes` how many values there were."""

    def __init__(self, script: Script, chance: random.Random) -> None:
        self.script: list[int] = []
        self.sizes: list[int] = []
        self._given, self._chance = script, chance

    def __call__(self, choice: Choice) -> Any:
        number, made = len(choice.values), len(self.script)
        place = self._given[made] if made < len(self._given) else int(self._chance.random() * number)
        self.script.append(place)
        self.sizes.append(number)
        return choice.values[min(place, number - 1)]


def below(draw: Callable[[st.SearchStrategy], Any], script: Script) -> Draw:
    """Hypothesis chooses: mostly what the script does, now and then what is simpler, never what is not."""
    places, number = iter(script), Numbered(draw)

    def choose(choice: Choice) -> Any:
        place, last = next(places), len(choice.values) - 1
        tried = number(1 + max(ALTERNATIVES - 1, LIKELY * place) if last else 1, choice.alone)
        return choice.values[min(tried, place, last)]

    return choose
