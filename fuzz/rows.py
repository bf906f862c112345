"""The covering list: cases in which every two words that can meet do, each two in the smallest world they can.

A row is a script (`fuzz.choices`), so that Hypothesis can try what is simpler where it fails (`strategies.rows`). The
list is found by climbing from scripts that chance makes, always the same ones, when it is asked for. Knows no ranks.
"""

import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property

from fuzz import meetings
from fuzz.case import Case
from fuzz.choices import Script, Scripted
from fuzz.coverage import AIMED, DIMENSIONS, Meeting, pairs, threes, words
from fuzz.space import DEGREES, NAMED, worlds, worlds_below
from fuzz.strategies import scripted
from toy_models.spec import Layout

STARTS = 150  # scripts by chance, in which most words occur
KEPT = 5  # scripts with a word, to take it from
TRIED = 1  # of them, in a step
SHAKEN = 1000  # rows made by chance where none can be taken from others
BAG = 400  # rows by chance, to choose from for three words at a time
WORTH = 12  # new meetings of three, without which a row is not worth its time
ALIKE = 3  # values of a choice that are tried, to see what it moves
FIRST_SIZE = 2 + 2 * len(NAMED)  # behind the world and the degrees: experts, top-k, layers, and the shape of the batch
SIZES = range(FIRST_SIZE, FIRST_SIZE + 9)
# Rows of one response token know no raggedness, no holes, no discount, and end with each other: they hide most bugs.
KEPT_UP = {FIRST_SIZE + 6: 1}  # the response: two tokens


@dataclass(frozen=True)
class Row:
    """A case, the script that makes it in a world, and how many values each choice has."""

    world: int
    script: Script
    sizes: tuple[int, ...]
    case: Case

    @cached_property
    def words(self) -> dict[str, str]:
        """What it covers."""
        return words(self.case, DIMENSIONS)

    @cached_property
    def said(self) -> set[str]:
        """The same as parts of meetings."""
        return {f"{name}={word}" for name, word in self.words.items()}


def made(world: int, script: Script, chance: random.Random) -> Row:
    """The row of a script, which chance completes."""
    draw = Scripted(script, chance)
    case = scripted(world, draw)
    return Row(world, tuple(draw.script), tuple(draw.sizes), case)


@cache
def covering(world: int) -> tuple[Row, ...]:
    """The rows of a world: what can meet in it, and in no smaller one."""
    missing, found = {meeting for meeting, least in meetings.pairs(world).items() if least == world}, []
    search, hopeless = _Search(world), set[Meeting]()
    while left := missing - hopeless:
        often = Counter(word for meeting in left for word in meeting)
        wanted = max(sorted(left), key=lambda meeting: sum(map(often.__getitem__, meeting)))
        if start := search.reached(wanted):
            found.append(search.improved(start, wanted, missing))
            missing.difference_update(pairs(found[-1].words))
        else:
            hopeless.add(wanted)
    return _cheaper(found, {meeting for meeting, least in meetings.pairs(world).items() if least == world})


def _cheaper(rows: list[Row], wanted: set[Meeting]) -> tuple[Row, ...]:
    """The rows with sizes lowered as long as nothing is lost that no other row has: tokens are what a row costs."""
    often = Counter(meeting for row in rows for meeting in pairs(row.words))
    for at, row in enumerate(rows):
        own = {meeting for meeting in pairs(row.words) if meeting in wanted and often[meeting] == 1}
        rows[at] = _lowered(row, own)
        often.update(pairs(rows[at].words))
        often.subtract(pairs(row.words))
    return tuple(rows)


def _lowered(row: Row, own: set[Meeting]) -> Row:
    """With each of its sizes at the least, or next to it, that keeps its own meetings."""
    for place in SIZES:
        for value in range(KEPT_UP.get(place, 0), min(2, row.script[place])):
            script = (*row.script[:place], value, *row.script[place + 1 :])
            other = made(row.world, script, random.Random(row.world))
            if own <= set(pairs(other.words)) and other.case.layout.world == row.world:
                row = other
                break
    return row


@cache
def threefold(world: int) -> tuple[Row, ...]:
    """Rows by chance for three words at a time: of many, again and again the one in which most meet that have not."""
    met = {three for ranks in worlds(world) for row in covering(ranks) for three in _threes(row)}
    chance, found = random.Random(world), list[Row]()
    left = {row: _threes(row) for row in (made(world, (_place(world),), chance) for _ in range(BAG))}
    while left:
        best = max(left, key=lambda row: len(left[row] - met))
        if len(new := left.pop(best) - met) < WORTH:
            break
        met |= new
        found.append(best)
    return tuple(found)


def _threes(row: Row) -> set[Meeting]:
    return set(threes(words(row.case, AIMED)))


def with_layout(layout: Layout, seed: int) -> Row:
    """A row with these degrees, all else by chance."""
    chosen = [x for name in NAMED for x in (DEGREES.index(getattr(layout, name)), 0)]
    return made(layout.world, (_place(layout.world), 0, *chosen), random.Random(seed))


def _place(world: int) -> int:
    """Which choice is the world that is mostly drawn: the first after all smaller ones."""
    return len(worlds_below(world))


class _Search:
    """What was seen in a world: scripts by the words that they have, and by which choices a dimension moves."""

    def __init__(self, world: int) -> None:
        self._world, self._chance = world, random.Random(world)
        self._having: dict[str, list[Row]] = defaultdict(list)
        self._levers: dict[str, set[int]] = defaultdict(set)
        starts = [self._made((_place(world),)) for _ in range(STARTS)]
        unseen = set(self._having)
        while unseen:
            row = max(starts, key=lambda row: len(unseen & row.said))
            unseen -= row.said
            self._probe(row)

    def _made(self, script: Script) -> Row:
        row = made(self._world, script, self._chance)
        for word in row.said:
            having = self._having[word]
            having[KEPT - 1 :] = [*having[KEPT - 1 :], row][:1]
        return row

    def _probe(self, row: Row) -> None:
        """Make each choice otherwise, to see what it moves."""
        before = row.words
        for place in range(1, len(row.script)):
            for value in {0, *range(min(row.sizes[place], ALIKE)), row.sizes[place] - 1} - {row.script[place]}:
                after = self._made((*row.script[:place], value, *row.script[place + 1 :])).words
                for name in DIMENSIONS:
                    self._levers[name] |= {place} if after[name] != before[name] else set()

    def _taken(self, row: Row, word: str) -> Iterator[Row]:
        """The row with a word of others: with those of their choices that move the dimension."""
        levers = self._levers[word.partition("=")[0]]
        for other in self._having[word][::-1]:
            yield self._made(tuple((other if n in levers else row).script[n] for n in range(len(row.script))))

    def reached(self, wanted: Meeting) -> Row | None:
        """A row in which they meet: of one word's rows and another's, else by chance in what moves them."""
        for word, other in itertools.permutations(wanted):
            for row in tuple(self._having[word]):
                if found := next((row for row in (row, *self._taken(row, other)) if _has(row, wanted)), None):
                    return found
        return next((row for row in self._shaken(wanted) if _has(row, wanted)), None)

    def _shaken(self, wanted: Meeting) -> Iterator[Row]:
        """Rows with one of the words, and a few of the choices made anew that move both, or what rules tie to them."""
        names = {name for word in wanted for name in meetings.related(word.partition("=")[0])}
        levers = sorted(set().union(*(self._levers[name] for name in names)))
        near = [row for word in wanted for row in self._having[word]]
        for row in self._chance.choices(near, k=SHAKEN) if near else ():
            script = list(row.script)
            for place in self._chance.sample(levers, min(len(levers), self._chance.randint(1, 5))):
                script[place] = self._chance.randrange(row.sizes[place])
            yield self._made(tuple(script))

    def improved(self, row: Row, wanted: Meeting, missing: set[Meeting]) -> Row:
        """The row with words of others, as long as more of the missing meet and the wanted still do."""
        before = best = _gain(row, missing)
        for word in self._lacking(row, missing):
            for other in itertools.islice(self._taken(row, word), TRIED if word not in row.said else 0):
                if (gain := _gain(other, missing)) > best and _has(other, wanted):
                    row, best = other, gain
        return row if best == before else self.improved(row, wanted, missing)

    def _lacking(self, row: Row, missing: set[Meeting]) -> list[str]:
        """Words that would meet one of the row's for the first time, in any order."""
        halves = {(a, b) for a, b in missing if (a in row.said) != (b in row.said)}
        words = sorted({b if a in row.said else a for a, b in halves})
        return self._chance.sample(words, len(words))


def _has(row: Row, wanted: Meeting) -> bool:
    return row.said.issuperset(wanted)


def _gain(row: Row, missing: set[Meeting]) -> int:
    return len(missing.intersection(pairs(row.words)))
