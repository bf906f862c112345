"""One shard: a rank pool and a loop over chunks, each a search as `pytest fuzz/` makes it. Knows the properties and
Hypothesis; nothing of Ray, of other shards, of the campaign's files. `Ledger` is anything with that class's methods.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import SkipTest

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st
from hypothesis.database import ExampleDatabase

from fuzz import device, known
from fuzz import test_ep_ppo_props as properties
from fuzz.case import HarnessFault, Violation
from fuzz.deep import arms, database
from fuzz.deep.campaign import DONE, EXHAUSTED, FAULT
from fuzz.deep.discovery import New
from fuzz.deep.judging import Bench, Judging
from fuzz.deep.ledger import Chunk, Ledger, Told
from fuzz.functions.families import FAMILIES
from fuzz.functions.strategies import calls
from fuzz.rehearsal import rehearse_rows
from fuzz.replay import start
from fuzz.rows import Row, covering, threefold, with_layout
from fuzz.space import all_layouts
from fuzz.strategies import cases
from fuzz.timebox import TimeUp
from fuzz.trial import Trials

FAULTS = 3  # faults of the harness in a row after which a shard gives up
QUIET: dict[str, Any] = {
    "deadline": None,
    "derandomize": False,  # which Hypothesis's own profile has where CI is set
    "print_blob": False,
    "verbosity": Verbosity.quiet,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.differing_executors],
}
# What was saved is tried in chunks of its own.
DRAWING, SAVED = (Phase.generate, Phase.target, Phase.shrink), (Phase.reuse, Phase.shrink)

Search = Callable[[Judging], None]


def run(number: int, ledger: Ledger, told: Told) -> None:
    """Chunk after chunk until there is none. HarnessFault where several in a row could not be run."""
    on_gpus = told.gpus_per_rank > 0
    device.choose("cuda" if on_gpus else "cpu", _sharing(told.gpus_per_rank) if on_gpus else device.SHARED)
    start()
    plants = (*(known.mends() if told.known else ()), *told.plants)
    with closing(Trials(plants=plants)) as trials, TemporaryDirectory(prefix="fuzz-shard-") as private:
        examples = database.shared(told.database, Path(told.examples), partial(ledger.note, "database"))
        seconds, folder = told.shrink_seconds, Path(private)
        bench = Bench(
            shard=number, ledger=ledger, trials=trials, folder=folder, shrink_seconds=seconds, known=told.known
        )
        _loop(bench, examples)


def _sharing(gpus_per_rank: float) -> int:
    """How many ranks one GPU takes."""
    return max(1, min(device.MOST_SHARED, int(1 / gpus_per_rank)))


def _loop(bench: Bench, examples: ExampleDatabase) -> None:
    faults, met = 0, set[New]()
    while chunk := bench.ledger.next(bench.shard):
        how, why = _ran(bench, chunk, examples, met)
        bench.ledger.end(chunk.number, how, why)
        faults = faults + 1 if why else 0
        if faults == FAULTS:
            raise RuntimeError(f"{FAULTS} chunks in a row ended with a fault of the harness, the last: {why}")


def _ran(bench: Bench, chunk: Chunk, examples: ExampleDatabase, met: set[New]) -> tuple[str, str]:
    """How a chunk ended, and why where that was a fault of the harness."""
    try:
        for search in searches(chunk, examples):
            judging = Judging(bench, chunk.number, chunk.left, met)
            _searched(search, judging)
            judging.investigate()
    except (Exception, HarnessFault) as error:
        bench.trials.close()
        return FAULT, f"{chunk.arm.name}, seed {chunk.seed}: {type(error).__name__}: {error}"
    return (EXHAUSTED if _is_last(chunk) else DONE), ""


def _searched(search: Search, judging: Judging) -> None:
    """Run a search; what it found is with the judging. What it ends with is a fault of ours, if no violation."""
    try:
        search(judging)
    except (Violation, TimeUp, SkipTest):  # skipped: nothing was saved under this key
        pass
    except ExceptionGroup as several:
        if others := several.split(Violation)[1]:
            raise others from None


# ---- what a chunk searches -------------------------------------------------------------------------------------


def searches(chunk: Chunk, examples: ExampleDatabase) -> Iterator[Search]:
    """The searches of a chunk: one, but for the functions of a family, which have one each."""
    arm = chunk.arm
    if arm.kind == arms.ROWS:
        part = rows_of(arm.what, arm.world)[chunk.start : chunk.start + chunk.size]
        yield lambda judging: rehearse_rows(judging.case, part, **QUIET)
    elif arm.kind == arms.REGION:
        pins: dict[str, Any] = dict(arm.pins)
        drawn = _drawn(chunk, cases(world=arm.world, **pins))
        yield lambda judging: drawn(judging.case)
    elif arm.kind == arms.FUNCTIONS:
        for name in FAMILIES[arm.what]:
            drawn = _drawn(chunk, calls(function=f"{arm.what}.{name}", world=arm.world))
            yield partial(lambda drawn, judging: drawn(judging.call), drawn)
    else:
        yield _property(chunk, examples)


def _drawn(chunk: Chunk, strategy: st.SearchStrategy[Any]) -> Callable[[Callable[[Any], None]], None]:
    """What is found there has its folder; no property of pytest would read it back."""

    def search(judge: Callable[[Any], None]) -> None:
        @seed(chunk.seed)
        @settings(max_examples=chunk.size, database=None, phases=DRAWING, **QUIET)
        @given(strategy)
        def some(value: Any) -> None:
            judge(value)

        some()

    return search


def _property(chunk: Chunk, examples: ExampleDatabase) -> Search:
    """A property of `pytest fuzz/` as it is, under the key that it has there: pytest reads back what is saved."""
    arm = chunk.arm
    plain = getattr(properties, f"test_{arm.what}").hypothesis.inner_test
    node = f"fuzz/{Path(properties.__file__).name}::{plain.__name__}[{arm.world}ranks]"
    plain._hypothesis_internal_add_digest = node.encode()  # as Hypothesis's plugin for pytest does
    draft, phases = database.Draft(examples), SAVED if arm.kind == arms.SAVED else DRAWING
    chosen = settings(max_examples=chunk.size, database=draft, phases=phases, **QUIET)
    test = chosen(seed(chunk.seed)(given(st.data())(plain)))  # in this order: a seed takes the database away

    def search(judging: Judging) -> None:
        try:
            test(judging.broken if "broken" in arm.what else judging.case, arm.world)
        finally:
            if not judging.met_others:
                draft.forget()

    return search


@cache
def rows_of(what: str, world: int) -> tuple[Row, ...]:
    """A list of rows; always the same."""
    if what == "every_layout":
        return tuple(with_layout(layout, number) for number, layout in enumerate(all_layouts(world)))
    return {"covering": covering, "three_at_a_time": threefold}[what](world)


def _is_last(chunk: Chunk) -> bool:
    rows = chunk.arm.kind == arms.ROWS
    return rows and chunk.start + chunk.size >= len(rows_of(chunk.arm.what, chunk.arm.world))
