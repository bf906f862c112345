"""What of a judged case counts as discovered, and which failures are the same. Knows values only; no files, no ranks.

A cell is a layout; a behaviour is a law that had something to check on a way through the dispatcher, or a fact such as
a starved expert there; pairs and triples are those of `fuzz.coverage`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from fuzz import coverage, known
from fuzz.case import Case, Violation
from fuzz.space import NAMED
from toy_models.spec import Layout

New = tuple[str, str]  # kind, what


def cell(layout: Layout) -> str:
    """The layout in words: world and degrees, as the summary names it."""
    return f"{layout.world}: " + " ".join(f"{name}{getattr(layout, name)}" for name in NAMED)


def degrees(cell: str) -> dict[str, int]:
    """World and degrees of a cell."""
    world, _, rest = cell.partition(": ")
    return {"world": int(world)} | {word.rstrip("0123456789"): int(re.sub(r"\D", "", word)) for word in rest.split()}


def met(case: Case, counts: Mapping[str, int], facts: Mapping[str, bool]) -> Iterator[New]:
    """Everything that a case met."""
    words = coverage.words(case, coverage.ALL)
    yield "cell", cell(case.layout)
    for pair in coverage.pairs(words):
        yield "pair", " & ".join(pair)
    for three in coverage.threes(words):
        yield "triple", " & ".join(three)
    for name in (*(law for law, n in counts.items() if n), *(fact for fact, true in facts.items() if true)):
        yield "behaviour", f"{name} & {words['path']}"
    for bug in known.met(case):
        yield "known", f"{bug} & {cell(case.layout)}"


def identity(violation: Violation) -> tuple[str, str]:
    """Law, and the first diverging tensor as the witness names it, or the root cause: what tells failures apart.

    Numbers of ranks, steps, layers, experts and elements are left out: they are where it was seen, not what it is.
    """
    return violation.law, violation.cause or _tensor(violation.witness)


def _tensor(witness: str) -> str:
    parts = [part for part in re.split(r", (?![^[]*\])", witness) if not re.match(r"(rank|ranks|element) ", part)]
    return re.sub(r"\d+", "*", ", ".join(parts))


def document(value: Any) -> str:
    """A case to be kept: as JSON; what is no Case as the line that makes it."""
    from fuzz.case_json import to_json

    return to_json(value) if isinstance(value, Case) else repr(value)
