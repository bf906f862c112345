"""What a campaign can spend time on, and what next: short chunks of one property in one region of the layout map.

The choice is a function of the log alone, made between chunks; no strategy ever sees it. Knows no Hypothesis, no files.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from fuzz.space import NAMED, PROPERTIES, all_layouts, worlds

CHUNK = 50  # cases of a chunk: every Hypothesis run begins with the simplest case, so fewer would repeat it too often
RECENT = 3  # chunks of an arm that tell what the next one will bring
FADING = 0.5  # of a chunk's weight, for each chunk after it
RESTLESS = 0.3  # of the best arm's rate, what an arm gains while each other could have had a chunk
LEAST = 5.0  # seconds that a chunk counts for at least: one that has just begun says nothing yet
FAMILIES = ("mappings", "routing", "permutation", "balance", "clipping", "entropy", "stages", "helpers", "state")
SAVED, ROWS, PROPERTY, FUNCTIONS, REGION = "saved", "rows", "property", "functions", "region"
DRAWN = ("any_case", "dispatchers_and_repetition", "shipped_precision", "broken_configurations_are_refused")
LISTS = ("covering", "every_layout", "three_at_a_time")


@dataclass(frozen=True, eq=False)
class Arm:
    """`what` is a property, a list of rows, or a family of functions; `pins` of a region are degrees of the layout.

    `once`: the arm is through after one chunk; a list when its rows are.
    """

    kind: str
    what: str
    world: int
    pins: Mapping[str, int] = field(default_factory=dict)
    once: bool = False

    @property
    def name(self) -> str:
        pinned = "".join(f" {name}={degree}" for name, degree in self.pins.items())
        return f"{self.kind} {self.what} {self.world}{pinned}"


@cache
def arms(max_ranks: int, families: tuple[str, ...] = ()) -> tuple[Arm, ...]:
    """Everything that there is, in the order in which each is tried for the first time."""
    sizes = [world for world in PROPERTIES if world <= max_ranks]
    return (
        *(Arm(SAVED, what, world, once=True) for what in DRAWN for world in sizes),
        *(Arm(ROWS, what, world) for what in LISTS[:2] for world in worlds(max_ranks)),
        *(Arm(PROPERTY, what, world) for what in DRAWN for world in reversed(sizes)),
        *_regions(max_ranks),
        *(Arm(FUNCTIONS, family, world) for family in families for world in sizes if world <= 8),
        *(Arm(ROWS, LISTS[2], world) for world in worlds(max_ranks)),
    )


def _regions(max_ranks: int) -> Iterable[Arm]:
    """One degree pinned, in worlds that have several."""
    for world in (size for size in worlds(max_ranks) if size >= 4):
        for name in NAMED:
            for degree in sorted({getattr(layout, name) for layout in all_layouts(world)} - {1}):
                yield Arm(REGION, "cases", world, {name: degree})


@dataclass(frozen=True, kw_only=True)
class Pull:
    """A chunk as the log has it; `worth` of what it met first. `last`: no row came after; `lost`: to be done again."""

    arm: str
    start: int = 0
    seconds: float = 0.0
    worth: float = 0.0
    last: bool = False
    lost: bool = False


def choose(every: Sequence[Arm], pulls: Sequence[Pull], size: int = CHUNK) -> tuple[Arm, int] | None:
    """The arm to spend the next chunk on, and where in its rows; None where all are over.

    One never tried comes first, else the one that promises most per second. A chunk that has just begun counts as one
    that brings nothing, so that shards spread out.
    """
    of: dict[str, list[Pull]] = {arm.name: [] for arm in every}
    for pull in pulls:
        of.setdefault(pull.arm, []).append(pull)
    left = {arm: start for arm in every if (start := _start(arm, of[arm.name], size)) is not None}
    if fresh := next((arm for arm in left if all(pull.lost for pull in of[arm.name])), None):
        return fresh, left[fresh]
    rates = {arm: _rate(of[arm.name]) for arm in left}
    best = max(rates.values(), default=0.0) or 1.0
    latest = {pull.arm: n for n, pull in enumerate(pulls)}
    alone = {arm: (len(pulls) - latest[arm.name]) / len(left) for arm in left}
    chosen = max(left, key=lambda arm: rates[arm] / best + RESTLESS * alone[arm], default=None)
    return (chosen, left[chosen]) if chosen else None


def _start(arm: Arm, pulls: Sequence[Pull], size: int) -> int | None:
    """The first slice of rows that nobody has or had; None where there is none. What is drawn has no end."""
    if arm.kind != ROWS:
        return None if arm.once and any(not pull.lost for pull in pulls) else 0
    taken = {pull.start for pull in pulls if not pull.lost}
    last = min((pull.start for pull in pulls if pull.last), default=math.inf)
    start = next(start for start in range(0, size * (len(taken) + 1), size) if start not in taken)
    return start if start <= last else None


def _rate(pulls: Sequence[Pull]) -> float:
    """What is new per second, of the last chunks, the latest first."""
    recent = [(FADING**age, pull) for age, pull in enumerate(pulls[::-1][:RECENT])]
    seconds = sum(weight * max(pull.seconds, LEAST) for weight, pull in recent)
    return sum(weight * pull.worth for weight, pull in recent) / seconds
