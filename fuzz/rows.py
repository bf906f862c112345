"""The covering list: cases in which every two words that can meet do, each two in the smallest world they can.

A row is a script (`fuzz.choices`), so that Hypothesis can try what is simpler where it fails (`strategies.rows`). The
list is found by climbing from scripts that chance makes, always the same ones, when it is asked for. Knows no ranks.
"""

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from fuzz import meetings
from fuzz.case import Case
from fuzz.choices import Script, Scripted
from fuzz.coverage import DIMENSIONS, Meeting, pairs, words
from fuzz.space import DEGREES, NAMED, worlds
from fuzz.strategies import scripted
from toy_models.spec import Layout

STARTS = 200  # scripts by chance, in which most words occur
PROBED = 3  # of them, in which every choice is made anew, to see what moves
KEPT = 6  # scripts with a word, to start from


@dataclass(frozen=True)
class Row:
    """A case, the script that makes it in a world, and how many values each choice has."""

    world: int
    script: Script
    sizes: tuple[int, ...]
    case: Case

    @property
    def words(self) -> dict[str, str]:
        """What it covers."""
        return words(self.case, DIMENSIONS)


def made(world: int, script: Script, chance: random.Random) -> Row:
    """The row of a script, which chance completes."""
    draw = Scripted(script, chance)
    case = scripted(world, draw)
    return Row(world, tuple(draw.script), tuple(draw.sizes), case)


@cache
def covering(world: int) -> tuple[Row, ...]:
    """The rows of a world: what can meet in it, and in no smaller one."""
    search = _Search(world)
    missing, found = {meeting for meeting, least in meetings.pairs(world).items() if least == world}, []
    for wanted in sorted(missing):
        if wanted in missing and (start := search.reached(wanted)):
            found.append(search.improved(start, wanted, missing))
            missing.difference_update(pairs(found[-1].words))
    return tuple(found)


def layouts(layout: Layout, number: int) -> Row:
    """A row with this layout, all else by chance."""
    chosen = [x for name in NAMED for x in (DEGREES.index(getattr(layout, name)), 0)]
    return made(layout.world, (_place(layout.world), 0, *chosen), random.Random(number))


def _place(world: int) -> int:
    """Which choice is the world that is mostly drawn: the first after all smaller ones."""
    return len(worlds(world - 1))


class _Search:
    """What was seen in a world: scripts by the words that they have, and by which choices a dimension moves."""

    def __init__(self, world: int) -> None:
        self._world, self._chance = world, random.Random(world)
        self._having: dict[str, list[Row]] = defaultdict(list)
        self._levers: dict[str, dict[int, None]] = defaultdict(dict)
        starts = [self._noted(made(world, (_place(world),), self._chance)) for _ in range(STARTS)]
        for row in starts[:PROBED]:
            self._probe(row)

    def _noted(self, row: Row) -> Row:
        for name, word in row.words.items():
            having = self._having[f"{name}={word}"]
            having[KEPT - 1 :] = [*having[KEPT - 1 :], row][:1]
        return row

    def _probe(self, row: Row) -> None:
        before = row.words
        for place, other in self._moves(row, range(1, len(row.script))):
            for name, word in other.words.items():
                if word != before[name]:
                    self._levers[name][place] = None

    def _moves(self, row: Row, places: Iterable[int]) -> Iterator[tuple[int, Row]]:
        """One choice made otherwise, in every way that there is (few of them for a choice of many)."""
        for place in places:
            for value in range(min(row.sizes[place], KEPT)):
                if value != row.script[place]:
                    script = (*row.script[:place], value, *row.script[place + 1 :])
                    yield place, self._noted(made(self._world, script, self._chance))

    def reached(self, wanted: Meeting) -> Row | None:
        """A row in which they meet: one of those that were seen, or one or two moves away from it."""
        near = [row for word in wanted for row in self._having[word]]
        places = self._places(wanted)
        for row in near:
            if _has(row, wanted):
                return row
        ones = [other for row in near for _, other in self._moves(row, places)]
        if found := next((row for row in ones if _has(row, wanted)), None):
            return found
        keeping = (row for row in ones if set(wanted) & _said(row))
        return next((row for one in keeping for _, row in self._moves(one, places) if _has(row, wanted)), None)

    def _places(self, said: Iterable[str]) -> list[int]:
        names = dict.fromkeys(word.partition("=")[0] for word in said)
        return list(dict.fromkeys(place for name in names for place in self._levers[name]))

    def improved(self, row: Row, wanted: Meeting, missing: set[Meeting]) -> Row:
        """The row moved, choice by choice, to where more of the missing meet, and the wanted still do."""
        places = self._places(word for meeting in missing for word in meeting)
        self._chance.shuffle(places)
        best = _gain(row, missing)
        for place in places:
            for _, other in self._moves(row, [place]):
                gain = _gain(other, missing)
                if gain > best and _has(other, wanted):
                    row, best = other, gain
        return row


def _said(row: Row) -> set[str]:
    return {f"{name}={word}" for name, word in row.words.items()}


def _has(row: Row, wanted: Meeting) -> bool:
    return set(wanted) <= _said(row)


def _gain(row: Row, missing: set[Meeting]) -> int:
    return sum(meeting in missing for meeting in pairs(row.words))
