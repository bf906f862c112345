"""What a failing case depends on: which case is simpler, neighbours one step away, the sentence that they make."""

import time
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings

from fuzz import forking, known
from fuzz.case import Case
from fuzz.neighbourhood import Neighbourhood, explore
from fuzz.neighbours import DIMENSIONS, LAYOUT, PARTS, SIZES, Neighbour, neighbours, value_of
from fuzz.order import size
from fuzz.space import VALUES, all_layouts
from fuzz.strategies import cases
from fuzz.trial import Trials
from toy_models.spec import PPO, Batch, Layout, MoEModel, Switches

EP = Case(layout=Layout(world=2, ep=2), batch=Batch(rows=2))
BUSY = Case(
    layout=Layout(world=8, ep=2, etp=2, tp=4),
    model=MoEModel(
        family="mixtral", norm_topk_prob=True, top_k=2, experts=4, layers=2, heads=4, kv_heads=4, hidden=16, ffn=4
    ),
    batch=Batch(rows=24, prompt=6, response=5, micro_rows=2, holes=True),
    ppo=PPO(mini_batches=3, optimizer="adam", lr=0.09, eps=1e-2, max_norm=0.3),
    seed=7,
)  # fmt: skip


def beside(case: Case, dimension: str) -> dict[str, Neighbour]:
    return {each.direction: each for each in neighbours(case) if each.dimension == dimension}


# ---- which case is simpler --------------------------------------------------------------------------------------

LADDER = (
    Case(),
    Case(seed=1),
    Case(model=MoEModel(heads=2)),
    Case(batch=Batch(holes=True)),
    Case(batch=Batch(holes=True, pad_is_eos=True)),
    Case(ppo=PPO(epochs=2)),
    Case(ppo=PPO(mini_batches=2), batch=Batch(rows=2)),
    Case(batch=Batch(response=2)),
    Case(batch=Batch(prompt=2)),
    Case(batch=Batch(rows=2, micro_rows=2)),
    Case(batch=Batch(rows=2)),
    Case(model=MoEModel(layers=2)),
    Case(model=MoEModel(top_k=2)),
    Case(model=MoEModel(experts=3)),
    Case(layout=Layout(world=2), batch=Batch(rows=2)),
    EP,
    Case(layout=Layout(world=2, tp=2), model=MoEModel(heads=2, kv_heads=2)),
    Case(layout=Layout(world=2, tp=2, ep=2), model=MoEModel(heads=2, kv_heads=2)),
    Case(layout=Layout(world=4), batch=Batch(rows=4)),
)


def test_fewer_ranks_come_first_then_experts_top_k_layers_tokens_steps_and_switches() -> None:
    """Whatever is larger further down the list outweighs all that stands above it."""
    assert [LADDER.index(case) for case in sorted(reversed(LADDER), key=size)] == list(range(len(LADDER)))
    switched = replace(Case(), batch=Batch(holes=True), ppo=PPO(whiten=True, max_norm=0.3), seed=99)
    assert size(switched) < size(Case(ppo=PPO(epochs=2)))


@settings(max_examples=200, derandomize=True, database=None, deadline=None)
@given(cases(max_ranks=8), cases(max_ranks=8))
def test_any_two_cases_have_an_order(one: Case, other: Case) -> None:
    assert (size(one) < size(other)) + (size(other) < size(one)) == (one != other)


# ---- neighbours ------------------------------------------------------------------------------------------------


@settings(max_examples=300, derandomize=True, database=None, deadline=None)
@given(cases(max_ranks=8))
def test_every_neighbour_is_where_it_says_and_every_step_is_back_to_back(case: Case) -> None:
    """A Case checks itself; each neighbour has its value, and no pair of dimension and direction comes twice."""
    found = neighbours(case)
    assert len({(each.dimension, each.direction) for each in found}) == len(found) > 30
    for each in found:
        assert value_of(each.case, each.dimension) == each.value != value_of(case, each.dimension)
        assert each.case.layout.world <= 8 or each.case.layout.world == 2 * case.layout.world
        if each.dimension in {**LAYOUT, **SIZES}:
            assert (each.direction == "down") == (size(each.case) < size(case)), each


@settings(max_examples=100, derandomize=True, database=None, deadline=None)
@given(cases(max_ranks=8))
def test_a_neighbour_has_values_that_are_drawn(case: Case) -> None:
    """Layouts that there are, settings that the strategies have."""
    for each in neighbours(case):
        layout = replace(each.case.layout, vpp=1, order=Layout().order, split="even", stages=())
        assert layout in all_layouts(layout.world) or layout.world > 8
        if each.dimension in VALUES and not each.dimension.endswith("lr"):
            assert each.value in VALUES[each.dimension]


@pytest.mark.parametrize(
    ("dimension", "down", "up"),
    [
        ("EP", Case(batch=Batch(rows=2), layout=Layout(world=2)), replace(
            EP, layout=Layout(world=4, ep=4), model=MoEModel(experts=4), batch=Batch(rows=4))),
        ("TP", None, Case(layout=Layout(world=2, ep=2, tp=2), model=MoEModel(heads=2, kv_heads=2))),
        ("ETP", None, replace(EP, layout=Layout(world=4, ep=2, etp=2), batch=Batch(rows=4))),
        ("ranks", None, replace(EP, layout=Layout(world=4, ep=2), batch=Batch(rows=4))),
        ("experts", None, replace(EP, model=MoEModel(experts=4))),
        ("top-k", None, replace(EP, model=MoEModel(top_k=2))),
        ("micro-batches", None, replace(EP, batch=Batch(rows=4))),
        ("mini-batches", None, replace(EP, batch=Batch(rows=4), ppo=PPO(mini_batches=2))),
        ("family", None, replace(EP, model=MoEModel(family="qwen2moe", hidden=4, shared_ffn=2))),
        ("optimizer", None, replace(EP, ppo=PPO(optimizer="adam", lr=0.1 * 0.3, critic_lr=0.1 * 0.3))),
        ("precision", None, replace(EP, precision="float32", ppo=PPO(eps=1e-3))),
        ("PP", None, replace(EP, layout=Layout(world=4, ep=2, pp=2), model=MoEModel(layers=2))),
        ("CP", None, Case(layout=Layout(world=2, ep=2, cp=2))),
        ("VPP", None, None),
        ("order", None, replace(EP, layout=Layout(world=2, ep=2, order="tp-cp-ep-pp-dp"))),
        ("dense", None, None),
        ("kv_heads", None, replace(EP, model=MoEModel(heads=2, kv_heads=2))),
        ("norm_topk_prob", None, None),
        ("eps", None, None),
        ("p2p", None, None),
        ("deallocate", None, None),
        ("split", None, None),
        ("group", None, None),
    ],
)  # fmt: skip
def test_what_hangs_on_a_dimension_moves_along_and_nothing_else(
    dimension: str, down: Case | None, up: Case | None
) -> None:
    found = {direction: each.case for direction, each in beside(EP, dimension).items()}
    assert found == {name: case for name, case in (("down", down), ("up", up)) if case is not None}


PIPED = Case(
    layout=Layout(world=6, pp=2, vpp=2, cp=3, split="list", stages=(1, 0, 2, 1)),
    model=MoEModel(layers=4, dense=(0, 3), dense_ffn=3),
    batch=Batch(rows=5),
    switches=Switches(p2p="flushed", deallocate=True, group=3),
)


@pytest.mark.parametrize(
    ("dimension", "down", "up"),
    [
        ("PP", {"pp": 1, "vpp": 1, "split": "even", "stages": (), "p2p": "plain", "group": 0, "rows": 10},
               {"world": 12, "pp": 4, "layers": 8, "split": "even", "stages": (), "group": 5}),
        ("VPP", {"vpp": 1, "split": "even", "stages": (), "p2p": "plain", "group": 0},
                {"vpp": 3, "layers": 6, "split": "even", "stages": ()}),
        ("CP", {"cp": 1, "rows": 15}, {"cp": 6, "world": 12}),
        ("ranks", None, {"world": 12, "rows": 10}),
        ("layers", None, {"layers": 8, "split": "even", "stages": ()}),
        ("micro-batches", {"rows": 4, "group": 0}, {"rows": 6}),
        ("rows per micro-batch", None, {"rows": 10, "micro_rows": 2}),
        ("split", {"split": "even", "stages": ()}, None),
        ("dense", {"dense": (), "dense_ffn": 0}, None),
        ("dense_ffn", {"dense_ffn": 2}, {"dense_ffn": 4}),
        ("group", None, {"group": 5}),
        ("p2p", {"p2p": "overlapped"}, None),
        ("deallocate", {"deallocate": False}, None),
        ("order", None, None),
    ],
)  # fmt: skip
def test_what_belongs_to_pipelines_moves_along(dimension: str, down: dict | None, up: dict | None) -> None:
    """A cut that no longer fits becomes even; layers, groups of micro-batches and messages follow the stages."""
    found = {name: _differing(PIPED, each.case) for name, each in beside(PIPED, dimension).items()}
    assert found == {name: changes for name, changes in (("down", down), ("up", up)) if changes is not None}


def _differing(case: Case, other: Case) -> dict[str, Any]:
    pairs = ((getattr(case, part), getattr(other, part)) for part in PARTS)
    both = ((f.name, getattr(a, f.name), getattr(b, f.name)) for a, b in pairs for f in fields(a))
    return {name: after for name, before, after in both if after != before}


def test_query_groups_stay_shared_where_they_are_and_whole_where_they_are_not() -> None:
    """Moving TP says nothing about sharing a group between ranks, which has a dimension of its own."""
    whole = Case(layout=Layout(world=2, tp=2), model=MoEModel(heads=2, kv_heads=2))
    shared = replace(whole, model=MoEModel(heads=4, kv_heads=1))
    assert beside(whole, "TP")["up"].case.model.kv_heads == 4
    assert beside(shared, "TP")["up"].case.model.kv_heads == 1
    assert beside(whole, "kv_heads")["down"].case.model == MoEModel(heads=2, kv_heads=1)
    assert beside(shared, "kv_heads")["up"].case.model == MoEModel(heads=4, kv_heads=2)


def test_a_busy_case_has_a_neighbour_below_in_all_that_is_above_its_least() -> None:
    down = {each.dimension: each.value for each in neighbours(BUSY) if each.direction == "down"}
    sizes = {name: value for name, value in down.items() if name in {**LAYOUT, **SIZES}}
    assert sizes == {
        "EP": 1, "TP": 2, "ETP": 1, "ranks": 4, "experts": 2, "layers": 1, "micro-batches": 1,
        "rows per micro-batch": 1, "prompt": 5, "response": 4, "mini-batches": 2, "seed": 6,
    }  # fmt: skip
    assert (down["optimizer"], down["holes"], down["max_norm"], down["eps"]) == ("sgd", False, 0.0, 1e-4)
    assert "top-k" not in down, "mixtral has at least two"
    assert beside(BUSY, "optimizer")["down"].case.ppo.lr == 0.3, "the same place among the rates of the other"


def test_values_that_are_never_drawn_go_down_to_the_simplest() -> None:
    strange = Case(layout=Layout(world=3, ep=3), model=MoEModel(experts=3, aux_loss=0.7), batch=Batch(rows=3))
    assert beside(strange, "aux_loss")["down"].value == 0.0
    assert [each.case.layout.ep for each in beside(strange, "EP").values()] == [1, 6]


# ---- the sentence and the table --------------------------------------------------------------------------------


def around(fails: Callable[[Case], bool | None], case: Case = EP, **kwargs: float) -> Neighbourhood:
    return explore(case, lambda neighbour, _: fails(neighbour), **kwargs)


def test_a_bug_of_one_degree_is_told_in_one_sentence() -> None:
    assert around(lambda case: case.layout.ep > 1).sentence() == (
        "fails for EP=2 and EP=4, holds for EP=1; independent of TP, ETP, PP, CP, ranks, experts, top-k, layers, "
        "micro-batches, rows per micro-batch, prompt, response, mini-batches, epochs, seed and all 62 settings"
    )


def test_each_dimension_that_matters_is_told_and_the_rest_is_counted() -> None:
    case = replace(EP, ppo=PPO(max_norm=0.3))
    found = around(lambda c: c.ppo.max_norm == 0.3 and (None if c.layout.tp > 1 else c.layout.ep < 4), case)
    assert found.sentence().split("; ") == [
        "fails for EP=1 and EP=2, holds for EP=4",
        "fails for max_norm=0.3, holds for max_norm=0.0 and max_norm=1.0",
        "independent of ETP, PP, CP, ranks, experts, top-k, layers, micro-batches, rows per micro-batch, prompt, "
        "response, mini-batches, epochs, seed and the other 61 settings",
        "unclear for TP=2",
    ]
    assert found.smaller == replace(case, layout=Layout(world=2))


def test_the_table_has_what_it_depends_on_with_what_moved_along() -> None:
    lines = around(lambda case: case.layout.ep > 1).table().splitlines()
    assert lines == [
        "| dimension | down | here: fails | up |",
        "| --- | --- | --- | --- |",
        "| EP | 1: holds | 2 | 4 (with world=4, experts=4): fails |",
    ]


def test_what_does_not_fit_into_the_time_is_said() -> None:
    """Every trial takes 50 ms: within 0.12 s there is room for three; EP down comes first."""
    told: list[float] = []

    def slow(case: Case, left: float) -> bool:
        told.append(left)
        time.sleep(0.05)
        return case.layout.ep > 1

    found = explore(EP, slow, seconds=0.12)
    assert len(told) == 3 and 0.12 >= told[0] > told[1] > told[2] > 0
    assert found.sentence().startswith(
        "fails for EP=2 and EP=4, holds for EP=1; independent of TP; not tried: ETP, PP, CP,"
    )
    assert found.sentence().endswith("seed and all 62 settings")
    assert len(found.untried) == len(neighbours(EP)) - 3
    assert "| ranks |  | 2 | 4: not tried |" in found.table()


def test_neighbours_on_more_ranks_than_allowed_are_not_tried() -> None:
    found = around(lambda case: case.layout.ep > 1, max_ranks=2)
    assert found.sentence().startswith("fails for EP=2, holds for EP=1; independent of TP, CP, experts,")
    assert found.sentence().endswith("not tried: EP=4 (4 ranks), ETP, PP and ranks")


def test_no_smaller_neighbour_means_none() -> None:
    assert around(lambda case: case.layout.ep > 1).smaller is None
    assert around(lambda case: False).sentence().count("holds for") == len({each.dimension for each in neighbours(EP)})


def test_the_smallest_of_the_smaller_ones_is_chosen() -> None:
    assert around(lambda case: True, BUSY).smaller == beside(BUSY, "ranks")["down"].case


def test_every_dimension_of_the_tables_is_a_field() -> None:
    assert all(value_of(BUSY, dimension) is not None for dimension in DIMENSIONS)


# ---- a real bug ------------------------------------------------------------------------------------------------


def test_a_planted_bug_is_told_to_depend_on_ep_alone() -> None:
    """Gradients of experts divided by EP once too often: as the sentence of the issue says, on real ranks."""
    forking.warm_up()
    trials = Trials(plants=(*known.mends(), "toy_models.planted.gradients:expert_gradients_scaled_twice"))
    law = "gradients match the reference"

    def fails(case: Case, _left: float) -> bool | None:
        if not any(
            getattr(case.layout, name) != getattr(EP.layout, name) for name in ("ep", "tp", "etp", "pp", "cp", "world")
        ):
            return None
        verdict = trials.judge(case)
        return verdict.violation is not None and verdict.violation.law == law

    try:
        found = explore(EP, fails)
    finally:
        trials.close()
    assert found.sentence().startswith(
        "fails for EP=2 and EP=4, holds for EP=1; independent of TP, ETP, PP, CP and ranks;"
    )
    assert found.smaller is None
