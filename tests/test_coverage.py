"""What is covered: words, which of them can meet, the rows in which they do, and that a failing row shrinks."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from fuzz import coverage, meetings
from fuzz.case import Case, Violation
from fuzz.choices import Scripted
from fuzz.rehearsal import rehearse_rows
from fuzz.rows import WORTH, covering, made, threefold, with_layout
from fuzz.space import NAMED, all_layouts, first_in
from fuzz.strategies import scripted
from fuzz.timebox import TimeBox, TimeUp
from toy_models.spec import PPO, Batch, Layout, MoEModel, Switches

DRAWN = 300


def by_chance(world: int, number: int) -> list[Case]:
    chance = random.Random(world)
    return [scripted(world, Scripted((), chance)) for _ in range(number)]


# ---- words -----------------------------------------------------------------------------------------------------

PIPELINE = Layout(world=4, tp=2, pp=2, split="list", stages=(3, 0))
PIPED = MoEModel(heads=2, kv_heads=1, layers=3, dense=(1,), dense_ffn=2)
READ = {
    "stages": (
        Case(layout=PIPELINE, model=PIPED, batch=Batch(rows=3)),
        {
            "tp": "2", "pp": "2", "split": "list", "empty stage": "yes", "contents": "last without experts",
            "query groups": "fewer than tp", "micro-batches": "other", "micro-batches to pp": "more", "tensor": "2+",
            "expert tensor": "1", "edp": "2+", "dp": "1",
        },
    ),
    "options": (
        Case(
            model=MoEModel(experts=3, top_k=3, tied=True),
            ppo=PPO(momentum=0.9, max_norm=1.0),
            switches=Switches(dispatcher="allgather"),
            twin="again",
        ),
        {
            "experts": "other", "top-k": "all", "tied": "on", "optimizer": "sgd with momentum", "clipping": "on",
            "dispatcher": "allgather", "twin": "again", "contents": "experts", "micro-batches to pp": "as many",
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize(("case", "expected"), READ.values(), ids=READ)
def test_a_case_in_words(case: Case, expected: dict[str, str]) -> None:
    read = coverage.words(case, coverage.ALL)
    assert {name: read[name] for name in expected} == expected


def test_a_code_keeps_every_word() -> None:
    """A tally carries a sign per dimension, and nothing is lost."""
    for case in by_chance(4, 50):
        assert coverage.decoded(coverage.code(case)) == coverage.words(case, coverage.ALL)
        assert len(coverage.code(case)) == len(coverage.ALL)


# ---- what can meet ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_what_is_drawn_can_meet(ranks: int) -> None:
    """No rule forbids what a valid case has, and none promises a smaller world than it takes."""
    two, three = meetings.pairs(ranks), meetings.threes(ranks)
    for case in by_chance(ranks, DRAWN):
        words, has = coverage.words(case, coverage.ALL), case.layout.world
        assert [pair for pair in coverage.pairs(words) if two.get(pair, ranks + 1) > has] == []
        assert [some for some in coverage.threes(words) if three.get(some, ranks + 1) > has] == []


@pytest.mark.parametrize(
    ("words", "ranks"),
    [
        ({"tp": "2", "split": "even"}, 2),
        ({"tp": "2", "split": "list"}, 4),
        ({"vpp": "2+", "pp": "1"}, None),
        ({"family": "mixtral", "contents": "mixed"}, None),
        ({"family": "mixtral", "contents": "last without experts"}, 2),
        ({"micro-batches to pp": "fewer", "micro-batches": "other"}, 4),
        ({"tp": "4", "edp": "1"}, 4),
        ({"tp": "4", "cp": "2"}, None),
    ],
)
def test_the_smallest_world(words: dict[str, str], ranks: int | None) -> None:
    """What the rules say together, which none of them says alone."""
    assert meetings.smallest_world(words, (1, 2, 3, 4)) == ranks


# ---- rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "allowed"), [(1, 0), (2, 4)])
def test_all_that_can_meet_does(ranks: int, allowed: int) -> None:
    """Every pair of the world; of two stages a few that the search does not find, which a summary names."""
    wanted = {pair for pair, least in meetings.pairs(ranks).items() if least == ranks}
    met = {pair for row in covering(ranks) for pair in coverage.pairs(row.words)}
    assert len(wanted - met) <= allowed, sorted(wanted - met)


def test_rows_for_three_at_a_time_add_what_no_other_row_has() -> None:
    """Each at least so many that it is worth its time; and of two ranks most of all there are."""
    met = {three for ranks in (1, 2) for row in covering(ranks) for three in _threes(row.case)}
    for row in threefold(2):
        assert row.case.layout.world == 2 and len(_threes(row.case) - met) >= WORTH
        met |= _threes(row.case)
    possible = {three for three, least in meetings.threes(2).items() if least <= 2}
    assert threefold(2) and met <= possible and len(met) > 0.9 * len(possible)


def _threes(case: Case) -> set[coverage.Meeting]:
    return set(coverage.threes(coverage.words(case, coverage.ALL)))


def test_the_rows_are_always_the_same() -> None:
    once = covering(1)
    covering.cache_clear()
    assert covering(1) == once


def test_every_row_is_tried_in_a_run() -> None:
    """As it is: none is left to chance."""
    tried: list[Case] = []
    rehearse_rows(tried.append, covering(1))
    assert tried == [row.case for row in covering(1)]


def test_every_layout_has_a_row() -> None:
    """203 of them with power-of-two degrees."""
    layouts = [layout for world in (1, 2, 4, 8) for layout in all_layouts(world)]
    rows = [with_layout(layout, seed).case.layout for seed, layout in enumerate(layouts)]
    degrees = [tuple(getattr(layout, name) for name in NAMED) for layout in layouts]
    assert [tuple(getattr(layout, name) for name in NAMED) for layout in rows] == degrees
    assert len(layouts) == len(set(zip([x.world for x in rows], degrees, strict=True))) == 203


def test_every_world_is_covered_by_one_property() -> None:
    assert [first_in(world) for world in (1, 2, 4, 8, 16)] == [[1], [2], [3, 4], [6, 8], [12, 16]]


# ---- shrinking -------------------------------------------------------------------------------------------------

BUGS: dict[str, tuple[Callable[[Case], bool], Case]] = {
    "tied": (lambda c: c.model.tied, Case(model=MoEModel(tied=True))),
    "ep": (lambda c: c.layout.ep >= 2, Case(layout=Layout(world=2, ep=2), batch=Batch(rows=2))),
    "ep_with_z_loss": (
        lambda c: c.layout.ep >= 2 and c.model.z_loss > 0,
        Case(layout=Layout(world=2, ep=2), batch=Batch(rows=2), model=MoEModel(z_loss=0.1)),
    ),
    "prompt": (lambda c: c.batch.prompt >= 3, Case(batch=Batch(prompt=3))),
}


@pytest.mark.parametrize(("broken", "least"), BUGS.values(), ids=BUGS)
def test_a_failing_row_shrinks_below_itself(broken: Callable[[Case], bool], least: Case) -> None:
    """To what the bug needs, and to fewer ranks than the row has."""
    chance = random.Random(6)
    rows = [made(4, (), chance) for _ in range(60)]
    box = TimeBox(600.0, lambda failure: None)

    def judge(case: Case) -> Violation | None:
        return Violation(case, "planted", "", "", "", "") if broken(case) else None

    with pytest.raises((Violation, TimeUp)):
        rehearse_rows(lambda case: box.run(case, judge), [row for row in rows if broken(row.case)][:1])
    [found] = [failure.violation.case for failure in box.failures.values()]
    assert replace(found, model=replace(found.model, hidden=8)) == least  # a row may begin with a smaller hidden size
