"""One choice among values, the simplest first, and who makes it: Hypothesis, a script, or Hypothesis below a script.

A script is the places of all choices of one case, in the order in which they are made. Knows nothing of cases.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from hypothesis import strategies as st

Script = tuple[int, ...]
Draw = Callable[["Choice"], Any]

# A choice below a script is at its place at least so many times in so many; more would be more than Hypothesis takes
# for an alternative, which it lowers before anything else.
ALTERNATIVES = 11
LIKELY = 4

FLAG = (False, True)


class Choice(NamedTuple):
    """One of `values` is chosen."""

    values: Sequence[Any]

    @property
    def strategy(self) -> st.SearchStrategy:
        """Shrinks towards the first. Made late: a script needs none, and making takes longer than choosing."""
        if isinstance(self.values, range):
            return st.integers(self.values[0], self.values[-1])
        return st.booleans() if self.values is FLAG else st.sampled_from(self.values)


def integers(least: int, most: int) -> Choice:
    """An int of `least` to `most`."""
    return Choice(range(least, most + 1))


def sampled_from(values: Sequence[Any]) -> Choice:
    """One of at least two values (Hypothesis makes no choice where there is one)."""
    return Choice(values)


def booleans() -> Choice:
    """False, or True."""
    return Choice(FLAG)


def drawn(draw: Callable[[st.SearchStrategy], Any]) -> Draw:
    """Hypothesis chooses."""
    return lambda choice: draw(choice.strategy)


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
    places = iter(script)

    def choose(choice: Choice) -> Any:
        place, last = next(places), len(choice.values) - 1
        if not last:
            return draw(choice.strategy)
        tried = draw(st.integers(0, max(ALTERNATIVES - 1, LIKELY * place)))
        return choice.values[min(tried, place, last)]

    return choose
