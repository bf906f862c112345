"""What a failing case depends on: which of its neighbours fail too, as a sentence and as a table.

Runs nothing itself: whether a neighbour fails it asks its caller. Knows no ranks, no laws, no Hypothesis.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from fuzz.case import Case
from fuzz.neighbours import DIMENSIONS, LAYOUT, SIZES, Neighbour, neighbours, value_of
from fuzz.order import size

SECONDS = 30.0
FEW = 3  # settings that are named in a sentence; more are counted
WORDS = {True: "fails", False: "holds", None: "unclear"}


@dataclass(frozen=True)
class Neighbourhood:
    """A failing case and its neighbours: those that were tried and what came of it (None: nothing can be said), and
    those that were not, for want of time or of ranks.
    """

    case: Case
    tried: tuple[tuple[Neighbour, bool | None], ...]
    untried: tuple[Neighbour, ...] = ()

    @property
    def smaller(self) -> Case | None:
        """The smallest neighbour that is smaller than the case and fails too: it was not minimal."""
        failing = [neighbour.case for neighbour, fails in self.tried if fails]
        return min((case for case in failing if size(case) < size(self.case)), key=size, default=None)

    def sentence(self) -> str:
        """What a maintainer needs: 'fails for EP=2 and EP=4, holds for EP=1; independent of TP'."""
        matters = [self._contrast(name) for name in DIMENSIONS if False in self._outcomes(name)]
        unclear = [_named(n.dimension, n.value) for n, fails in self.tried if fails is None]
        parts = {
            "": "; ".join(matters),
            "independent of ": _listed(self._independent()),
            "unclear for ": _listed(unclear),
            "not tried: ": _listed(self._not_tried()),
        }
        return "; ".join(f"{words}{what}" for words, what in parts.items() if what)

    def table(self) -> str:
        """What the failure depends on: the value below, its own and the value above, in Markdown."""
        seen = {n.dimension for n in self._all()} - {
            n for n in DIMENSIONS if self._outcomes(n) and all(self._outcomes(n))
        }
        names = [name for name in DIMENSIONS if name in seen]
        if not names:
            return ""
        rows = [
            (name, self._cell(name, "down"), str(value_of(self.case, name)), self._cell(name, "up")) for name in names
        ]
        lines = [("dimension", "down", "here: fails", "up"), ("---",) * 4, *rows]
        return "\n".join(f"| {' | '.join(row)} |" for row in lines)

    def _all(self) -> list[Neighbour]:
        return [*(neighbour for neighbour, _ in self.tried), *self.untried]

    def _outcomes(self, dimension: str) -> list[bool | None]:
        return [fails for neighbour, fails in self.tried if neighbour.dimension == dimension]

    def _contrast(self, dimension: str) -> str:
        """'fails for EP=2 and EP=4, holds for EP=1'."""
        of = {n.direction: (n.value, fails) for n, fails in self.tried if n.dimension == dimension}
        none = (None, None)
        ladder = [of.get("down", none), (value_of(self.case, dimension), True), of.get("up", none)]
        fails, holds = ([_named(dimension, value) for value, came in ladder if came is each] for each in (True, False))
        return f"fails for {_listed(fails)}, holds for {_listed(holds)}"

    def _independent(self) -> list[str]:
        names = [name for name in DIMENSIONS if (came := self._outcomes(name)) and all(came)]
        return _shortened(names, [name for name in DIMENSIONS if self._outcomes(name)])

    def _not_tried(self) -> list[str]:
        """Dimensions of which nothing was tried by name; values of the others."""
        names = dict.fromkeys(n.dimension for n in self.untried if not self._outcomes(n.dimension))
        values = [_needing(n, self.case) for n in self.untried if n.dimension not in names]
        return [*values, *_shortened(list(names), [n.dimension for n in self._all()])]

    def _cell(self, dimension: str, direction: str) -> str:
        came = {n: WORDS[fails] for n, fails in self.tried} | dict.fromkeys(self.untried, "not tried")
        for neighbour, words in came.items():
            if (neighbour.dimension, neighbour.direction) == (dimension, direction):
                along = ", ".join(f"{name}={value}" for name, value in neighbour.along)
                return f"{neighbour.value}{f' (with {along})' if along else ''}: {words}"
        return ""


def explore(
    case: Case,
    fails: Callable[[Case, float], bool | None],
    seconds: float = SECONDS,
    max_ranks: int = 4,
) -> Neighbourhood:
    """Try the neighbours, the most telling first, for `seconds`, on at most `max_ranks` or as many as the case has.

    `fails` is told the seconds left, and says whether a case breaks the same law (True), holds (False), or neither.
    """
    beside, most = neighbours(case), max(max_ranks, case.layout.world)
    until = time.monotonic() + seconds
    tried: list[tuple[Neighbour, bool | None]] = []
    untried: list[Neighbour] = []
    for neighbour in beside:
        left = until - time.monotonic()
        if left > 0 and neighbour.case.layout.world <= most:
            tried.append((neighbour, fails(neighbour.case, left)))
        else:
            untried.append(neighbour)
    return Neighbourhood(case, tuple(tried), tuple(untried))


def _named(dimension: str, value: Any) -> str:
    return f"{value} rank{'s' * (value > 1)}" if dimension == "ranks" else f"{dimension}={value}"


def _needing(neighbour: Neighbour, case: Case) -> str:
    """A value that was not tried, with the ranks that it needs where they are more."""
    named, world = _named(neighbour.dimension, neighbour.value), neighbour.case.layout.world
    more = world > case.layout.world and neighbour.dimension != "ranks"
    return f"{named} ({world} ranks)" if more else named


def _shortened(names: list[str], among: Iterable[str]) -> list[str]:
    """Layout and sizes by name; settings by number where they are many."""
    settings = [name for name in names if name not in LAYOUT | SIZES]
    every = len(settings) == len({name for name in among if name not in LAYOUT | SIZES})
    if len(settings) <= FEW:
        return names
    return [
        *(name for name in names if name not in settings),
        f"{'all' if every else 'the other'} {len(settings)} settings",
    ]


def _listed(words: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
