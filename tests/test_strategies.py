"""What is drawn: valid by construction, everything reached, the smallest case first, pins honoured or refused."""

import itertools
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, find, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from fuzz import choices, layout_strategies
from fuzz.case import PRECISIONS, TWINS, Case
from fuzz.space import DEGREES, EPSILONS, NAMED, PINNED, VALUES, all_layouts, schedules, worlds_below
from fuzz.strategies import cases, layouts
from toy_models.spec import (
    ACTIVATIONS,
    AS_FAMILY,
    DISPATCHERS,
    FAMILIES,
    OPTIMIZERS,
    PIPES,
    PPO,
    RAGGEDNESS,
    RECOMPUTES,
    ROUTER_DTYPES,
    SCORES,
    SINKS,
    SPLITS,
    Batch,
    Layout,
    MoEModel,
    Switches,
)

STEADY: dict[str, Any] = {"derandomize": True, "database": None, "deadline": None}
STEADY_SEEDED = settings(database=None, deadline=None)
DRAWS = 1500
# Of them; Hypothesis draws numbers that stand in our sources too, so an edit anywhere moves a count of 20 by up to 10.
OFTEN = 8


def drawn(strategy: SearchStrategy, number: int) -> list[Any]:
    """`number` examples, the same ones every time."""
    seen = []

    @settings(max_examples=number, **STEADY)
    @given(strategy)
    def collect(value: Any) -> None:
        seen.append(value)

    collect()
    return seen


@cache
def many() -> list[Case]:
    return drawn(cases(), DRAWS)


# ---- the smallest case -----------------------------------------------------------------------------------------


def smallest(condition: Callable[[Case], bool]) -> Case:
    """Where two of three searches end: one in ten ends on four ranks, where Hypothesis completes by chance what it has
    cut short (the leaps of `fuzz.descent` go on from there in a run).
    """
    steady, ends = settings(STEADY_SEEDED, max_examples=500), list[Case]()
    while len(ends) == len(set(ends)) < 3:
        ends.append(find(cases(), condition, settings=steady, random=random.Random(len(ends))))
    return max(ends, key=ends.count)


MINIMA: dict[str, tuple[Callable[[Case], bool], Case]] = {
    "any": (lambda c: True, Case()),
    "world": (lambda c: c.layout.world >= 2, Case(layout=Layout(world=2), batch=Batch(rows=2))),
    "ep": (lambda c: c.layout.ep >= 2, Case(layout=Layout(world=2, ep=2), batch=Batch(rows=2))),
    "etp": (
        lambda c: c.layout.etp >= 2,
        Case(layout=Layout(world=2, etp=2), model=MoEModel(ffn=4), batch=Batch(rows=2)),
    ),
    "tp": (lambda c: c.layout.tp >= 2, Case(layout=Layout(world=2, tp=2), model=MoEModel(heads=2, kv_heads=2))),
    "ep_and_etp": (
        lambda c: c.layout.ep >= 2 and c.layout.etp >= 2,
        Case(layout=Layout(world=4, ep=2, etp=2), model=MoEModel(ffn=4), batch=Batch(rows=4)),
    ),
    "pp": (lambda c: c.layout.pp >= 2, Case(layout=Layout(world=2, pp=2), model=MoEModel(layers=2))),
    "cp": (lambda c: c.layout.cp >= 2, Case(layout=Layout(world=2, cp=2))),
    "vpp": (
        lambda c: c.layout.vpp >= 2,
        Case(layout=Layout(world=2, pp=2, vpp=2), model=MoEModel(layers=4), batch=Batch(rows=2)),
    ),
    "dense": (lambda c: c.model.dense, Case(model=MoEModel(layers=2, dense=(0,), dense_ffn=1))),
    "top_k": (lambda c: c.model.top_k >= 2, Case(model=MoEModel(top_k=2))),
    "layers": (lambda c: c.model.layers >= 2, Case(model=MoEModel(layers=2))),
    "aux_loss": (lambda c: c.model.aux_loss > 0, Case(model=MoEModel(aux_loss=1.0))),
    "seed": (lambda c: c.seed >= 7, Case(seed=7)),
    "adam": (lambda c: c.ppo.optimizer == "adam", Case(ppo=PPO(optimizer="adam", lr=0.03, critic_lr=0.03))),
}


LONG = ("vpp", "dense", "top_k", "layers", "aux_loss", "seed", "adam")
EACH = [pytest.param(*MINIMA[name], id=name, marks=[pytest.mark.slow] if name in LONG else []) for name in MINIMA]


@pytest.mark.parametrize(("condition", "least"), EACH)
def test_what_matters_is_all_that_a_shrunk_case_shows(condition: Callable[[Case], bool], least: Case) -> None:
    """World 2 and not 4, and nothing moves but what must: the repr in a report is the bug and nothing else."""
    assert smallest(condition) == least


@pytest.mark.parametrize("mostly", [2, pytest.param(4, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize("name", ["ep", "etp", "tp", "pp", "cp"])
def test_a_failure_shrinks_below_the_world_that_is_mostly_drawn(name: str, mostly: int) -> None:
    """A bug of one degree is found on many ranks and shrinks to two: in two of three searches at least.

    Hypothesis completes by chance what it has cut short, and one search in ten ends on four ranks.
    """
    steady = settings(STEADY_SEEDED, max_examples=200, phases=[Phase.generate, Phase.shrink])
    strategy, broken = cases(mostly=mostly), lambda case: getattr(case.layout, name) >= 2
    ends = [find(strategy, broken, settings=steady, random=random.Random(seed)) for seed in range(3)]
    assert ends.count(MINIMA[name][1]) >= 2, ends


@pytest.mark.parametrize(("degree", "ranks"), [("ep", 4), ("tp", 4), ("ep", 8), ("etp", 8), ("pp", 4), ("cp", 8)])
def test_a_degree_keeps_its_meaning_when_the_world_shrinks(degree: str, ranks: int) -> None:
    """The whole world in one group: wherever that is found, it is found again on two ranks."""
    found = find(
        cases(mostly=ranks),
        lambda case: case.layout.world == getattr(case.layout, degree) > 1,
        settings=settings(max_examples=500, **STEADY),
    )
    assert found == MINIMA[degree][1]


class Counting:
    """`hypothesis.strategies`, with a note of every primitive that is drawn."""

    def __init__(self) -> None:
        self.draws: list[str] = []  # each is one choice: `integers` where there is one value

    def __getattr__(self, name: str) -> Callable[..., SearchStrategy]:
        return lambda *arguments: getattr(st, name)(*arguments).map(partial(self._note, name))

    def _note(self, name: str, value: Any) -> Any:
        self.draws.append(name)
        return value


@pytest.mark.parametrize(
    "pins",
    [
        {"max_ranks": 8},
        {"mostly": 4},
        {"mostly": 1},
        {"world": 4, "ep": 2, "family": "mixtral", "precision": "float32"},
    ],
)
def test_every_case_draws_equally_many_choices(pins: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Hypothesis prefers fewer choices to smaller ones: a larger layout with fewer draws would win."""
    counting, seen = Counting(), set[int]()
    monkeypatch.setattr(choices, "st", counting)

    @settings(max_examples=60, **STEADY)
    @given(st.data())
    def collect(data: st.DataObject) -> None:
        counting.draws.clear()
        data.draw(cases(**pins))
        seen.add(len(counting.draws))

    collect()
    assert len(seen) == 1 and min(seen) > 40, seen


def test_no_draw_has_a_single_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """`sampled_from` draws nothing where it has one value: the number of choices would hang on the layout."""
    shortest: list[int] = []
    noting = {"sampled_from": lambda values: shortest.append(len(values)) or st.sampled_from(values)}
    monkeypatch.setattr(choices, "st", SimpleNamespace(**vars(st) | noting))
    drawn(cases(max_ranks=8), 60)
    assert min(shortest) >= 2


# ---- what is reached -------------------------------------------------------------------------------------------


def test_every_layout_is_drawn() -> None:
    """All 67 layouts of 1 to 4 ranks, and no other; the power-of-two worlds have 1, 10, 46 and 146."""
    assert [len(all_layouts(world)) for world in (1, 2, 3, 4, 6, 8)] == [1, 10, 10, 46, 100, 146]
    possible = {layout for world in (1, 2, 3, 4) for layout in all_layouts(world)}
    uncut = {replace(c.layout, vpp=1, order=Layout().order, split="even", stages=()) for c in many()}
    assert uncut <= possible and len(possible - set(drawn(layouts(), DRAWS))) <= 2


def test_every_schedule_of_virtual_stages_is_one_that_runs() -> None:
    """Groups of the interleaved schedule: at least as many micro-batches as stages, also in the last one."""
    for pp in (2, 3, 4):
        for number, group in schedules(pp):
            assert pp <= group <= number and (number % group == 0 or number % group >= pp)
            Case(
                layout=Layout(world=pp, pp=pp, vpp=2),
                model=MoEModel(layers=2 * pp),
                batch=Batch(rows=number),
                switches=Switches(group=group if group > pp else 0),
            )


def chosen(degrees: list[int]) -> Counter[int]:
    """How many of all pairs of choices draw each degree."""
    pairs = itertools.product(range(len(DEGREES)), range(len(degrees)))
    return Counter(layout_strategies._degree(partial(next, iter(pair)), degrees) for pair in pairs)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_layouts_of_a_world_are_equally_likely(ranks: int) -> None:
    """Each degree as often as layouts have it, given those before. Counted, not sampled: Hypothesis repeats itself."""
    ways = {(): list(all_layouts(ranks))}
    for name in NAMED:
        for left in ways.values():
            having = Counter(getattr(layout, name) for layout in left)
            assert chosen(list(having.elements())) == {degree: len(DEGREES) * n for degree, n in having.items()}
        split = [(*way, getattr(layout, name), layout) for way, left in ways.items() for layout in left]
        ways = {way[:-1]: [other[-1] for other in split if other[:-1] == way[:-1]] for way in split}


@pytest.mark.parametrize(("mostly", "least"), [(2, 0.8), (4, 0.6), (8, 0.35)])
def test_mostly_is_most_of_the_cases_and_not_all(mostly: int, least: float) -> None:
    worlds = Counter(layout.world for layout in drawn(layouts(mostly=mostly), 400))
    assert set(worlds) == {*worlds_below(mostly), mostly}
    assert least < worlds[mostly] / 400 < 0.95
    assert worlds.most_common(1)[0][0] == mostly


def test_mostly_one_rank_is_always_one_rank() -> None:
    assert {layout.world for layout in drawn(layouts(mostly=1), 20)} == {1}


# Every bag of values that a case is filled from, by the path of its field.
REACHED: dict[str, tuple[Any, ...]] = {
    "model.family": FAMILIES,
    "layout.order": VALUES["order"],
    "model.layers": (1, 2, 3, 4),
    "model.kv_heads": (1, 2, 4),
    "model.experts": (2, 3, 4, 5, 6, 8),
    "model.top_k": (1, 2, 3, 4),
    "model.norm_topk_prob": (False, True),
    "model.tied": (False, True),
    "model.score": SCORES,
    "model.expert_bias": (0.0, 0.5, 0.125),
    "model.bias_rate": (0.0, 0.0625, 0.5),
    "model.scaling": (1.0, 2.5, 0.4),
    "model.group_topk": (0, 1, 2),
    "switches.router_dtype": ROUTER_DTYPES,
    "model.activation": ACTIVATIONS,
    "model.gated": (True, False),
    "model.clamp": (0.0, 0.5, 2.0),
    "model.glu_offset": (0.0, 1.0, -0.25),
    "model.qk_norm": AS_FAMILY,
    "model.output_gate": (False, True),
    "model.sinks": SINKS,
    "model.biases": (False, True),
    "switches.qk_scaling": (False, True),
    "switches.fp32_residual": (False, True),
    "switches.deterministic": (False, True),
    "switches.shared_overlap": (False, True),
    "switches.distributed": (False, True),
    "switches.overlap_reduce": (False, True),
    "switches.overlap_gather": (False, True),
    "switches.align": (False, True),
    "switches.bucket": (0, 1, 50),
    "switches.pad_buckets": (False, True),
    "switches.average": (False, True),
    "switches.check_nan": (False, True),
    "switches.count_zeros": (False, True),
    "switches.recompute": RECOMPUTES,
    "switches.per_token": (False, True),
    "ppo.embedding_lr": (0.0, 0.01, 0.05),
    "ppo.coupled_decay": (False, True),
    "ppo.qk_decay": (False, True),
    "switches.recompute_layers": (0, 1, 2, 3),
    "model.skew": (0.0, 4.0, 10.0, 1.0),
    "model.aux_loss": (0.0, 1.0, 0.3, 7.0),
    "model.seq_aux_loss": (0.0, 1.0, 0.3, 7.0),
    "model.global_aux_loss": (0.0, 1.0, 0.3, 7.0),
    "model.z_loss": (0.0, 0.1, 0.03, 1.0),
    "batch.raggedness": RAGGEDNESS,
    "batch.prompt": range(1, 7),
    "batch.response": range(1, 6),
    "batch.micro_rows": (1, 2),
    "batch.holes": (False, True),
    "batch.pad_is_eos": (False, True),
    "ppo.epochs": (1, 2),
    "ppo.mini_batches": (1, 2, 3),
    "ppo.temperature": (1.0, 0.7, 1.6),
    "ppo.gamma": (1.0, 0.9, 0.5),
    "ppo.lam": (1.0, 0.95, 0.6, 0.0),
    "ppo.kl_coef": (0.0, 0.1, 1.0),
    "ppo.clip_eps": (0.2, 0.05, 0.01),
    "ppo.value_clip": (0.2, 0.05, 0.01),
    "ppo.entropy_coef": (0.0, 0.1, 1.0),
    "ppo.whiten": (False, True),
    "ppo.optimizer": OPTIMIZERS,
    "ppo.weight_decay": (0.0, 0.1, 1.0),
    "ppo.momentum": (0.0, 0.9, 0.5),
    "ppo.eps": {eps for bag in EPSILONS.values() for eps in bag},
    "ppo.max_norm": (0.0, 0.3, 1.0, 0.05, 30.0),
    "switches.dispatcher": DISPATCHERS,
    "switches.perform_initialization": (True, False),
    "switches.deallocate": (False, True),
    "twin": (None, *TWINS),
    "precision": PRECISIONS,
}


def test_what_is_reached_is_what_there_is_to_draw() -> None:
    """`space.VALUES` tells the neighbourhood which values lie next to one another."""
    listed = {path.rpartition(".")[2]: set(values) for path, values in REACHED.items()}
    assert {name: set(values) for name, values in VALUES.items() if name in listed} == {
        name: listed[name] for name in VALUES if name in listed
    }


@pytest.mark.parametrize("path", REACHED)
def test_every_value_is_drawn_often(path: str) -> None:
    """An option that is hardly ever on is an option that nobody tests."""
    numbers = Counter(attrgetter(path)(case) for case in many())
    assert {value: numbers[value] for value in REACHED[path] if numbers[value] < OFTEN} == {}


# What only pipelines have.
PIPED: dict[str, tuple[Any, ...]] = {
    "layout.split": SPLITS,
    "layout.vpp": (1, 2, 3),
    "switches.p2p": PIPES,
    "switches.group": (0, 3),
}


@cache
def piped() -> list[Case]:
    return drawn(cases(pp=2), 600)


@pytest.mark.parametrize("path", PIPED)
def test_every_value_of_a_pipeline_is_drawn(path: str) -> None:
    numbers = Counter(attrgetter(path)(case) for case in piped())
    assert {value: numbers[value] for value in PIPED[path] if numbers[value] < 6} == {}


def test_clipping_is_on_in_about_half_of_the_cases() -> None:
    """Always on, it would hide wrong factors; never on, nobody would test it."""
    share = sum(case.ppo.max_norm > 0 for case in many()) / len(many())
    assert 0.4 < share < 0.8


# ---- pins ------------------------------------------------------------------------------------------------------

PINS: tuple[dict[str, Any], ...] = (
    {"world": 8},
    {"max_ranks": 2, "ep": 2},
    {"tp": 2, "etp": 1},
    {"world": 4, "tp": 2, "ep": 2, "etp": 2},
    {"max_ranks": 8, "tp": 8},
    {"max_ranks": 8, "pp": 2, "cp": 2},
    {"world": 6, "pp": 3},
    *({"family": family} for family in FAMILIES),
    *({"precision": precision} for precision in PRECISIONS),
    *({"twin": twin} for twin in TWINS),
    *({"dispatcher": dispatcher} for dispatcher in DISPATCHERS),
)


def _has(case: Case, name: str, value: Any) -> bool:
    if name == "max_ranks":
        return case.layout.world <= value
    owner = next(x for x in (case, case.layout, case.model, case.switches) if hasattr(x, name))
    return getattr(owner, name) == value


@pytest.mark.parametrize("pins", PINS, ids=str)
def test_pins_are_honoured(pins: dict[str, Any]) -> None:
    """A pin holds in every case; what it needs elsewhere follows."""
    for case in drawn(cases(**pins), 8):
        assert all(_has(case, name, value) for name, value in pins.items()), case


@pytest.mark.parametrize("name", PINNED)
def test_every_degree_of_a_layout_can_be_pinned(name: str) -> None:
    """The derived degrees too."""
    assert {getattr(layout, name) for layout in drawn(layouts(**{name: 2}), 40)} == {2}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: cases(ep=3, world=4), ["world=4", "ep=3", "1, 2, 4"]),
        (lambda: cases(tp=8, max_ranks=4), ["tp=8", "1 or 2 or 3 or 4", "tp can be 1, 2, 3, 4"]),
        (lambda: cases(world=4, ep=4, etp=2), ["ep=4", "etp=2", "ep can be 1, 2"]),
        (lambda: cases(max_ranks=0), ["max_ranks=0"]),
        (lambda: cases(world=0), ["world=0"]),
        (lambda: cases(world=2, mostly=4), ["world=2", "mostly=4", "one of them"]),
        (lambda: cases(mostly=2, ep=4), ["world=2", "ep=4", "1, 2"]),
        (lambda: cases(family="llama"), ["family='llama'", *FAMILIES]),
        (lambda: cases(twin="none"), ["twin='none'", *TWINS]),
        (lambda: layouts(vpp=2), ["vpp", "tp, pp, cp, ep, etp, dp, edp"]),
        (lambda: layouts(max_ranks=4, pp=2, cp=4), ["pp=2", "cp=4", "cp can be 1, 2"]),
    ],
)
def test_impossible_pins_are_refused_at_the_call(make: Callable[[], object], said: list[str]) -> None:
    """A ValueError where the mistake stands, with the numbers and what would be possible."""
    with pytest.raises(ValueError) as caught:
        make()
    assert [part for part in said if part not in str(caught.value)] == [], str(caught.value)


# ---- what drawing needs ----------------------------------------------------------------------------------------


def test_drawing_needs_neither_torch_nor_megatron() -> None:
    """Strategies start in a second, and may run where no torch is."""
    code = (
        "import sys, hypothesis, fuzz.strategies as s\n"
        "hypothesis.find(s.cases(), lambda case: True)\n"
        "print(sorted({'torch', 'megatron', 'transformers', 'ray', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.parametrize("start", range(3))
def test_cases_are_drawn_anew_and_not_copied_from_one_another(start: int) -> None:
    """Hypothesis copies choices to where equal ones are made: four in five cases were nearly those before them."""
    found: list[Case] = []

    @seed(start)
    @settings(max_examples=60, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(cases())
    def collect(case: Case) -> None:
        found.append(case)

    collect()
    apart = [
        sum(a != b for a, b in zip(_settings(one), _settings(other), strict=True)) for one, other in pairwise(found)
    ]
    alike = sum(number <= 2 for number in apart)
    assert alike <= len(found) // 10, (
        f"{alike} of {len(found)} cases differ from the one before in at most two settings"
    )


def _settings(case: Case) -> list[object]:
    parts = (case.layout, case.model, case.batch, case.ppo, case.switches)
    return [*(value for part in parts for value in vars(part).values()), case.precision, case.twin, case.seed]
